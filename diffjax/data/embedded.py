"""Pictures that come with scikit-learn: handwritten digits, and crops of two photographs."""

from __future__ import annotations

import numpy as np

from diffjax.data.dataset import SPLITS, DataError, Dataset, fit_transform, from_arrays, permutation, split_indices

DIGITS_SEED = 1797  # the splits of the digits never change, so that scores of different runs compare
DIGITS_SIZES = {"test": 360, "classifier": 360, "validation": 80}  # and 997 to train on
BLOCK_SHARES = {"test": 0.17, "classifier": 0.17, "validation": 0.08}  # of the area of each photograph


def digits() -> Dataset:
    """The 1797 handwritten digits of scikit-learn, [8, 8, 1] with values 0..16, in fixed stratified splits.

    997 train, 80 validation (chooses settings), 360 classifier (trains feature networks), 360 test (only scores). The first
    360 drawn have chosen the settings of the digits job, so they are trained on, and the next ones of train only score.
    """
    from sklearn.datasets import load_digits

    raw = load_digits()
    splits = split_indices(len(raw.target), raw.target, seed=DIGITS_SEED, sizes=DIGITS_SIZES)
    seen, train = splits["test"], splits["train"]
    splits |= {"test": train[: len(seen)], "train": np.concatenate([seen, train[len(seen) :]])}
    return from_arrays(
        raw.images[..., None],
        raw.target,
        name="digits",
        seed=DIGITS_SEED,
        labels=tuple("0123456789"),
        licence="UCI optical recognition of handwritten digits, test part, as shipped with scikit-learn, which states "
        "no licence for it; the UCI repository lists CC BY 4.0",
        low=0.0,
        high=16.0,
        splits=splits,
    )


def photos(*, seed: int = 0, size: int | None = None, image_size: int | None = None) -> Dataset:
    """Random crops [image_size, image_size, 3] of scikit-learn's two photographs; the class is the photograph.

    Each photograph is tiled by blocks of twice the crop, every block belongs to one split, and a crop lies inside one
    block: crops of different splits share no pixel.
    Args: size: number of crops, default 6000.   image_size: side of a crop in pixels, default 32.
    Raises: DataError: a crop so large that the photographs hold fewer than 12 blocks each, or too few crops.
    """
    from sklearn.datasets import load_sample_images

    side, size = 32 if image_size is None else image_size, 6000 if size is None else size
    pictures = load_sample_images().images
    height, width, _ = pictures[0].shape
    rows, columns = (height // (2 * side), width // (2 * side)) if side > 0 else (0, 0)
    if rows * columns < 12:
        raise DataError(
            f"image_size must be in 1..{min(height // 6, width // 8)} for crops of the photographs; got {side}"
        )
    if size < 32:
        raise DataError(f"size must be at least 32 crops; got {size}")
    x = np.empty((size, side, side, 3), np.uint8)
    label = (np.arange(size) % 2).astype(np.int32)
    blocks = [_split_blocks(rows * columns, (seed, 1, i)) for i in range(2)]
    splits, start = {}, 0
    for split in SPLITS[::-1]:
        count = max(2, round(BLOCK_SHARES[split] * size)) if split in BLOCK_SHARES else size - start
        splits[split] = np.arange(start, start + count)
        start += count
        for i in splits[split]:
            block, down, right = np.random.Philox(np.random.SeedSequence((seed, 2, int(i)))).random_raw(3)
            mine = blocks[label[i]][split]
            row, column = divmod(int(mine[int(block) % len(mine)]), columns)
            top, left = 2 * side * row + int(down) % (side + 1), 2 * side * column + int(right) % (side + 1)
            x[i] = pictures[label[i]][top : top + side, left : left + side]
    return Dataset(
        "photos",
        {"x": x, "label": label},
        {k: splits[k] for k in SPLITS},
        fit_transform(x[splits["train"]]),
        num_classes=2,
        labels=("china", "flower"),
        licence="CC BY 2.0 (https://creativecommons.org/licenses/by/2.0/): china.jpg by danielbuechele, flower.jpg by "
        "vultilion, as shipped with scikit-learn; cropped at random",
    )


def _split_blocks(count: int, seed: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Which blocks of a photograph belong to which split, at least one each."""
    order, start, out = permutation(seed, count), 0, {}
    for split, share in BLOCK_SHARES.items():
        stop = start + max(1, round(share * count))
        out[split], start = order[start:stop], stop
    return out | {"train": order[start:]}
