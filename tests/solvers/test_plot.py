"""Tables as pictures."""

import dataclasses

import numpy as np
import pytest

from diffjax import processes, solvers, times
from diffjax.solvers import plot_table


def test_a_table_is_drawn(tmp_path):
    process = processes.vp()
    s = solvers.edm_heun(process, times.karras(process, 6, start=0.9, stop=0.1))
    figure = plot_table(s, tmp_path / "table.png", title="edm_heun")
    from PIL import Image

    picture = np.asarray(Image.open(tmp_path / "table.png").convert("L"))
    assert picture.std() > 10 and min(picture.shape) > 200
    upper, lower = figure.axes
    labels = [t.get_text() for t in upper.get_yticklabels()]
    assert "x+ <- z" in labels and "x+ <- c" not in labels
    np.testing.assert_allclose(lower.lines[0].get_ydata(), s.rows.t)
    assert upper.get_title() == "edm_heun"


def test_what_has_no_coefficients_is_refused():
    process = processes.vp()
    s = solvers.ddim(process, times.uniform(3))
    wide = s.rows._replace(qx=np.ones((3, 1, 1, 5)))
    with pytest.raises(ValueError, match=r"qx has shape \(3, 1, 1, 5\)"):
        plot_table(dataclasses.replace(s, rows=wide))
    with pytest.raises(ValueError, match="step of its own"):
        plot_table(dataclasses.replace(s, rows={"t": np.ones(3)}))
