"""Where every method comes from: the papers that catalogue cards name, and `cite`."""

from __future__ import annotations

import importlib
from typing import NamedTuple

from diffjax.types import Card

FOLDERS = ("processes", "times", "losses", "solvers", "guidance", "networks", "adapters", "metrics", "data")


class Paper(NamedTuple):
    """What a bibliography needs."""

    authors: str
    year: int
    title: str


PAPERS: dict[str, Paper] = {
    "arXiv:1610.06545": Paper("Lopez-Paz, David and Oquab, Maxime", 2017, "Revisiting Classifier Two-Sample Tests"),
    "arXiv:1706.08500": Paper("Heusel, Martin and Ramsauer, Hubert and Unterthiner, Thomas and Nessler, Bernhard and Hochreiter, Sepp",
                              2017, "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium"),
    "arXiv:1801.01401": Paper("Binkowski, Mikolaj and Sutherland, Danica J. and Arbel, Michael and Gretton, Arthur", 2018,
                              "Demystifying MMD GANs"),
    "arXiv:1804.01947": Paper("Kolouri, Soheil and Pope, Phillip E. and Martin, Charles E. and Rohde, Gustavo K.", 2019,
                              "Sliced-Wasserstein Autoencoder: An Embarrassingly Simple Generative Model"),
    "arXiv:1904.06991": Paper("Kynkaanniemi, Tuomas and Karras, Tero and Laine, Samuli and Lehtinen, Jaakko and Aila, Timo", 2019,
                              "Improved Precision and Recall Metric for Assessing Generative Models"),
    "arXiv:2002.09797": Paper("Naeem, Muhammad Ferjad and Oh, Seong Joon and Uh, Youngjung and Choi, Yunjey and Yoo, Jaejun", 2020,
                              "Reliable Fidelity and Diversity Metrics for Generative Models"),
    "arXiv:2004.05675": Paper("Meehan, Casey and Chaudhuri, Kamalika and Dasgupta, Sanjoy", 2020,
                              "A Non-Parametric Test to Detect Data-Copying in Generative Models"),
    "arXiv:2202.09671": Paper("Zheng, Huangjie and He, Pengcheng and Chen, Weizhu and Zhou, Mingyuan", 2023,
                              "Truncated Diffusion Probabilistic Models and Diffusion-based Adversarial Auto-Encoders"),
    "arXiv:2206.00927": Paper("Lu, Cheng and Zhou, Yuhao and Bao, Fan and Chen, Jianfei and Li, Chongxuan and Zhu, Jun", 2022,
                              "DPM-Solver: A Fast ODE Solver for Diffusion Probabilistic Model Sampling in Around 10 Steps"),
    "arXiv:2406.12303": Paper("Li, Yiheng and Jiang, Heyang and Kodaira, Akio and Tomizuka, Masayoshi and Keutzer, Kurt and Xu, Chenfeng",
                              2024, "Immiscible Diffusion: Accelerating Diffusion Training with Noise Assignment"),
    "arXiv:2505.18521": Paper("Li, Yiheng and Liang, Feng and Kondratyuk, Dan and Tomizuka, Masayoshi and Keutzer, Kurt and Xu, Chenfeng",
                              2025, "Improved Immiscible Diffusion: Accelerate Diffusion Training by Reducing Its Miscibility"),
    "gretton2012": Paper("Gretton, Arthur and Borgwardt, Karsten M. and Rasch, Malte J. and Scholkopf, Bernhard and Smola, Alexander",
                         2012, "A Kernel Two-Sample Test"),
    "szekely2013": Paper("Szekely, Gabor J. and Rizzo, Maria L.", 2013, "Energy statistics: A class of statistics based on distances"),
    "villani2003": Paper("Villani, Cedric", 2003, "Topics in Optimal Transportation"),
    "arXiv:1803.00567": Paper("Peyre, Gabriel and Cuturi, Marco", 2019, "Computational Optimal Transport"),
    "arXiv:2006.11239": Paper("Ho, Jonathan and Jain, Ajay and Abbeel, Pieter", 2020, "Denoising Diffusion Probabilistic Models"),
    "arXiv:2010.02502": Paper("Song, Jiaming and Meng, Chenlin and Ermon, Stefano", 2021, "Denoising Diffusion Implicit Models"),
    "arXiv:2011.13456": Paper(
        "Song, Yang and Sohl-Dickstein, Jascha and Kingma, Diederik P. and Kumar, Abhishek and Ermon, Stefano and Poole, Ben",
        2021, "Score-Based Generative Modeling through Stochastic Differential Equations"),
    "arXiv:2102.09672": Paper("Nichol, Alex and Dhariwal, Prafulla", 2021, "Improved Denoising Diffusion Probabilistic Models"),
    "arXiv:2101.09258": Paper("Song, Yang and Durkan, Conor and Murray, Iain and Ermon, Stefano", 2021,
                              "Maximum Likelihood Training of Score-Based Diffusion Models"),
    "arXiv:2107.00630": Paper("Kingma, Diederik P. and Salimans, Tim and Poole, Ben and Ho, Jonathan", 2021,
                              "Variational Diffusion Models"),
    "arXiv:2202.00512": Paper("Salimans, Tim and Ho, Jonathan", 2022, "Progressive Distillation for Fast Sampling of Diffusion Models"),
    "arXiv:2204.00227": Paper("Choi, Jooyoung and Lee, Jungbeom and Shin, Chaehun and Kim, Sungwon and Kim, Hyunwoo and Yoon, Sungroh",
                              2022, "Perception Prioritized Training of Diffusion Models"),
    "arXiv:2204.13902": Paper("Zhang, Qinsheng and Chen, Yongxin", 2023, "Fast Sampling of Diffusion Models with Exponential Integrator"),
    "arXiv:2205.11487": Paper("Saharia, Chitwan and others", 2022,
                              "Photorealistic Text-to-Image Diffusion Models with Deep Language Understanding"),
    "arXiv:2206.00364": Paper("Karras, Tero and Aittala, Miika and Aila, Timo and Laine, Samuli", 2022,
                              "Elucidating the Design Space of Diffusion-Based Generative Models"),
    "arXiv:2207.12598": Paper("Ho, Jonathan and Salimans, Tim", 2022, "Classifier-Free Diffusion Guidance"),
    "arXiv:2209.03003": Paper("Liu, Xingchao and Gong, Chengyue and Liu, Qiang", 2023,
                              "Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow"),
    "arXiv:2210.02747": Paper("Lipman, Yaron and Chen, Ricky T. Q. and Ben-Hamu, Heli and Nickel, Maximilian and Le, Matt", 2023,
                              "Flow Matching for Generative Modeling"),
    "arXiv:2211.01095": Paper("Lu, Cheng and Zhou, Yuhao and Bao, Fan and Chen, Jianfei and Li, Chongxuan and Zhu, Jun", 2022,
                              "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models"),
    "arXiv:2212.09748": Paper("Peebles, William and Xie, Saining", 2023, "Scalable Diffusion Models with Transformers"),
    "arXiv:2212.11972": Paper("Jabri, Allan and Fleet, David and Chen, Ting", 2023, "Scalable Adaptive Computation for Iterative Generation"),
    "arXiv:2301.10972": Paper("Chen, Ting", 2023, "On the Importance of Noise Scheduling for Diffusion Models"),
    "arXiv:2301.11093": Paper("Hoogeboom, Emiel and Heek, Jonathan and Salimans, Tim", 2023,
                              "simple diffusion: End-to-end diffusion for high resolution images"),
    "arXiv:2302.00482": Paper("Tong, Alexander and others", 2024,
                              "Improving and generalizing flow-based generative models with minibatch optimal transport"),
    "arXiv:2303.00848": Paper("Kingma, Diederik P. and Gao, Ruiqi", 2023,
                              "Understanding Diffusion Objectives as the ELBO with Simple Data Augmentation"),
    "arXiv:2303.08797": Paper("Albergo, Michael S. and Boffi, Nicholas M. and Vanden-Eijnden, Eric", 2023,
                              "Stochastic Interpolants: A Unifying Framework for Flows and Diffusions"),
    "arXiv:2303.09556": Paper("Hang, Tiankai and others", 2023, "Efficient Diffusion Training via Min-SNR Weighting Strategy"),
    "arXiv:2305.08891": Paper("Lin, Shanchuan and Liu, Bingchen and Li, Jiashi and Yang, Xiao", 2024,
                              "Common Diffusion Noise Schedules and Sample Steps are Flawed"),
    "arXiv:2312.02696": Paper("Karras, Tero and Aittala, Miika and Lehtinen, Jaakko and Hellsten, Janne and Aila, Timo and Laine, Samuli",
                              2024, "Analyzing and Improving the Training Dynamics of Diffusion Models"),
    "arXiv:2403.03206": Paper("Esser, Patrick and others", 2024, "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis"),
    "arXiv:2404.07724": Paper("Kynkaanniemi, Tuomas and Aittala, Miika and Karras, Tero and Laine, Samuli and Aila, Timo and Lehtinen, Jaakko",
                              2024, "Applying Guidance in a Limited Interval Improves Sample and Distribution Quality in Diffusion Models"),
    "arXiv:2202.09778": Paper("Liu, Luping and Ren, Yi and Lin, Zhijie and Zhao, Zhou", 2022,
                              "Pseudo Numerical Methods for Diffusion Models on Manifolds"),
    "arXiv:2307.11118": Paper(
        "Wizadwongsa, Suttisak and Chinchuthakun, Worameth and Khungurn, Pramook and Raj, Amit and Suwajanakorn, Supasorn",
        2024, "Diffusion Sampling with Momentum for Mitigating Divergence Artifacts"),
    "hairer1993": Paper("Hairer, Ernst and Norsett, Syvert P. and Wanner, Gerhard", 1993,
                        "Solving Ordinary Differential Equations I: Nonstiff Problems"),
    "arXiv:2201.06503": Paper("Bao, Fan and Li, Chongxuan and Zhu, Jun and Zhang, Bo", 2022,
                              "Analytic-DPM: an Analytic Estimate of the Optimal Reverse Variance in Diffusion Probabilistic Models"),
    "arXiv:2401.08740": Paper(
        "Ma, Nanye and Goldstein, Mark and Albergo, Michael S. and Boffi, Nicholas M. and Vanden-Eijnden, Eric and Xie, Saining",
        2024, "SiT: Exploring Flow and Diffusion-based Generative Models with Scalable Interpolant Transformers"),
    "arXiv:2309.05019": Paper("Xue, Shuchen and Yi, Mingyang and Luo, Weijian and Zhang, Shifeng and Sun, Jiacheng and Li, Zhenguo and Ma, Zhi-Ming",
                              2023, "SA-Solver: Stochastic Adams Solver for Fast Sampling of Diffusion Models"),
    "arXiv:2310.13268": Paper("Zheng, Kaiwen and Lu, Cheng and Chen, Jianfei and Zhu, Jun", 2023,
                              "DPM-Solver-v3: Improved Diffusion ODE Solver with Empirical Model Statistics"),
    "arXiv:2302.04867": Paper("Zhao, Wenliang and Bai, Lujia and Rao, Yongming and Zhou, Jie and Lu, Jiwen", 2023,
                              "UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models"),
    "arXiv:2309.10438": Paper("Li, Lijiang and others", 2023,
                              "AutoDiffusion: Training-Free Optimization of Time Steps and Architectures for Automated Diffusion Model Acceleration"),
    "arXiv:2309.11497": Paper("Si, Chenyang and Huang, Ziqi and Jiang, Yuming and Liu, Ziwei", 2024, "FreeU: Free Lunch in Diffusion U-Net"),
    "arXiv:2312.07243": Paper("Liu, Enshu and Ning, Xuefei and Yang, Huazhong and Wang, Yu", 2024,
                              "A Unified Sampling Framework for Solver Searching of Diffusion Probabilistic Models"),
    "arXiv:1907.05600": Paper("Song, Yang and Ermon, Stefano", 2019, "Generative Modeling by Estimating Gradients of the Data Distribution"),
    "arXiv:2001.01328": Paper("Li, Xuechen and Wong, Ting-Kam Leonard and Chen, Ricky T. Q. and Duvenaud, David", 2020,
                              "Scalable Gradients for Stochastic Differential Equations"),
    "doi:10.1137/09076636X": Paper("Roessler, Andreas", 2010,
                                   "Runge-Kutta Methods for the Strong Approximation of Solutions of Stochastic Differential Equations"),
    "arXiv:1511.01844": Paper("Theis, Lucas and van den Oord, Aaron and Bethge, Matthias", 2016,
                              "A note on the evaluation of generative models"),
    "arXiv:1810.01367": Paper("Grathwohl, Will and Chen, Ricky T. Q. and Bettencourt, Jesse and Sutskever, Ilya and Duvenaud, David", 2019,
                              "FFJORD: Free-form Continuous Dynamics for Scalable Reversible Generative Models"),
    "arXiv:2206.05173": Paper("Franzese, Giulio and Rossi, Simone and Yang, Lixuan and Finamore, Alessandro and Rossi, Dario and Filippone, "
                              "Maurizio and Michiardi, Pietro", 2023,
                              "How Much is Enough? A Study on Diffusion Times in Score-based Generative Models"),
    "arXiv:2305.16317": Paper("Shih, Andy and Belkhale, Suneel and Ermon, Stefano and Sadigh, Dorsa and Anari, Nima", 2023,
                              "Parallel Sampling of Diffusion Models"),
    "arXiv:2311.15744": Paper("Hu, Minghui and Zheng, Jianbin and Zheng, Chuanxia and Wang, Chaoyue and Tao, Dacheng and Cham, Tat-Jen", 2024,
                              "One More Step: A Versatile Plug-and-Play Module for Rectifying Diffusion Schedule Flaws and Enhancing "
                              "Low-Frequency Controls"),
    "arXiv:2406.15735": Paper("Zhao, Min and Zhu, Hongzhou and Xiang, Chendong and Zheng, Kaiwen and Li, Chongxuan and Zhu, Jun", 2024,
                              "Identifying and Solving Conditional Image Leakage in Image-to-Video Diffusion Model"),
    "arXiv:2210.05559": Paper("Wu, Chen Henry and De la Torre, Fernando", 2022,
                              "Unifying Diffusion Models' Latent Space, with Applications to CycleDiffusion and Guidance"),
    "arXiv:2211.12446": Paper("Wallace, Bram and Gokul, Akash and Naik, Nikhil", 2023,
                              "EDICT: Exact Diffusion Inversion via Coupled Transformations"),
    "arXiv:2304.06140": Paper("Huberman-Spiegelglas, Inbar and Kulikov, Vladimir and Michaeli, Tomer", 2024,
                              "An Edit Friendly DDPM Noise Space: Inversion and Manipulations"),
    "arXiv:2307.10711": Paper("Pan, Jiachun and Liew, Jun Hao and Tan, Vincent Y. F. and Feng, Jiashi and Yan, Hanshu", 2024,
                              "AdjointDPM: Adjoint Sensitivity Method for Gradient Backpropagation of Diffusion Probabilistic Models"),
    "arXiv:2307.10829": Paper("Zhang, Guoqiang and Lewis, J. P. and Kleijn, W. Bastiaan", 2024,
                              "Exact Diffusion Inversion via Bi-directional Integration Approximation"),
    "arXiv:2410.07273": Paper("Wang, Fangyikang and Yin, Hubery and Dong, Yuejiang and Zhu, Huminhao and Zhang, Chao and Zhao, Hanbin "
                              "and Qian, Hui and Li, Chen",
                              2024, "BELM: Bidirectional Explicit Linear Multi-step Sampler for Exact Inversion in Diffusion Models"),
    "arXiv:2505.21114": Paper("Wang, Shuai and Li, Zexian and Zhang, Qipeng and Song, Tianhui and Li, Xubin and Ge, Tiezheng and others", 2025,
                              "Differentiable Solver Search for Fast Diffusion Sampling"),
    "arXiv:2510.02390": Paper("Li, Zilai", 2025, "Hyperparameters are all you need: Using five-step inference for an original diffusion model "
                              "to generate images comparable to the latest distillation model"),
    "arXiv:1812.06162": Paper("McCandlish, Sam and Kaplan, Jared and Amodei, Dario and OpenAI Dota Team", 2018,
                              "An Empirical Model of Large-Batch Training"),
    "arXiv:1705.07115": Paper("Kendall, Alex and Gal, Yarin and Cipolla, Roberto", 2018,
                              "Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry and Semantics"),
    "arXiv:2312.16486": Paper(
        "Lu, Guansong and Guo, Yuanfan and Han, Jianhua and Niu, Minzhe and Zeng, Yihan and Xu, Songcen and Huang, Zeyi and "
        "Zhong, Zhao and Zhang, Wei and Xu, Hang", 2023,
        "PanGu-Draw: Advancing Resource-Efficient Text-to-Image Synthesis with Time-Decoupled Training and Reusable Coop-Diffusion"),
    "arXiv:2501.05450": Paper("McAllister, David and Tancik, Matthew and Song, Jiaming and Kanazawa, Angjoo", 2025,
                              "Decentralized Diffusion Models"),
    "arXiv:2510.03434": Paper("Jiang, Zhiying and Seraj, Raihan and Villagra, Marcos and Roy, Bidhan", 2025,
                              "Paris: A Decentralized Trained Open-Weight Diffusion Model"),
    "arXiv:2204.07143": Paper("Hassani, Ali and Walton, Steven and Li, Jiachen and Li, Shen and Shi, Humphrey", 2022,
                              "Neighborhood Attention Transformer"),
    "arXiv:2401.11605": Paper("Crowson, Katherine and Baumann, Stefan Andreas and Birch, Alex and Abraham, Tanishq Mathew and Kaplan, "
                              "Daniel Z. and Shippole, Enrico", 2024,
                              "Scalable High-Resolution Pixel-Space Image Synthesis with Hourglass Diffusion Transformers"),
    "arXiv:2209.12152": Paper("Bao, Fan and Nie, Shen and Xue, Kaiwen and Cao, Yue and Li, Chongxuan and Su, Hang and Zhu, Jun", 2023,
                              "All are Worth Words: A ViT Backbone for Diffusion Models"),
    "arXiv:2407.11633": Paper("Fei, Zhengcong and Fan, Mingyuan and Yu, Changqian and Li, Debang and Huang, Junshi", 2024,
                              "Scaling Diffusion Transformers to 16 Billion Parameters"),
    "arXiv:2403.09176": Paper("Park, Byeongjun and Go, Hyojun and Kim, Jin-Young and Woo, Sangmin and Ham, Seokil and Kim, Changick",
                              2024, "Switch Diffusion Transformer: Synergizing Denoising Tasks with Sparse Mixture-of-Experts"),
    "arXiv:2412.16112": Paper("Liu, Songhua and Tan, Zhenxiong and Wang, Xinchao", 2024,
                              "CLEAR: Conv-Like Linearization Revs Pre-Trained Diffusion Transformers Up"),
    "arXiv:2406.09416": Paper("Liu, Qihao and Zeng, Zhanpeng and He, Ju and Yu, Qihang and Shen, Xiaohui and Chen, Liang-Chieh", 2024,
                              "Alleviating Distortion in Image Generation via Multi-Resolution Diffusion Models and Time-Dependent Layer Normalization"),
    "arXiv:2402.01516": Paper("Pham, Trung X. and Kang, Zhang and Yoo, Chang D.", 2024,
                              "Cross-view Masked Diffusion Transformers for Person Image Synthesis"),
    "arXiv:2504.14260": Paper("Xiao, Liu and Li, Zhiyuan and Lin, Yueyu", 2025, "Cross-attention for State-based model RWKV-7"),
    "arXiv:1810.00825": Paper("Lee, Juho and Lee, Yoonho and Kim, Jungtaek and Kosiorek, Adam R. and Choi, Seungjin and Teh, Yee Whye", 2019,
                              "Set Transformer: A Framework for Attention-based Permutation-Invariant Neural Networks"),
    "arXiv:2407.10998": Paper("Dat, Do Huu and Anh, Do Duc and Luu, Anh Tuan and Buntine, Wray", 2024,
                              "Discrete Diffusion Language Model for Efficient Text Summarization"),
    "arXiv:2503.14456": Paper("Peng, Bo and others", 2025, "RWKV-7 Goose with Expressive Dynamic State Evolution"),
    "arXiv:2211.17106": Paper("Yang, Xingyi and Zhou, Daquan and Feng, Jiashi and Wang, Xinchao", 2023,
                              "Diffusion Probabilistic Model Made Slim"),
    "arXiv:2310.20092": Paper(
        "Calvo-Ordonez, Sergio and Cheng, Chun-Wun and Huang, Jiahao and Zhang, Lipei and Yang, Guang and Schonlieb, "
        "Carola-Bibiane and Aviles-Rivero, Angelica I.", 2023, "The Missing U for Efficient Diffusion Models"),
    "arXiv:2112.10752": Paper("Rombach, Robin and Blattmann, Andreas and Lorenz, Dominik and Esser, Patrick and Ommer, Bjorn", 2022,
                              "High-Resolution Image Synthesis with Latent Diffusion Models"),
    "arXiv:2012.09841": Paper("Esser, Patrick and Rombach, Robin and Ommer, Bjorn", 2021,
                              "Taming Transformers for High-Resolution Image Synthesis"),
    "arXiv:1711.00937": Paper("van den Oord, Aaron and Vinyals, Oriol and Kavukcuoglu, Koray", 2017,
                              "Neural Discrete Representation Learning"),
    "arXiv:1801.03924": Paper("Zhang, Richard and Isola, Phillip and Efros, Alexei A. and Shechtman, Eli and Wang, Oliver", 2018,
                              "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric"),
    "arXiv:1611.07004": Paper("Isola, Phillip and Zhu, Jun-Yan and Zhou, Tinghui and Efros, Alexei A.", 2017,
                              "Image-to-Image Translation with Conditional Adversarial Networks"),
    "arXiv:2401.12517": Paper("Park, Dogyun and Kim, Sihyeon and Lee, Sojin and Kim, Hyunwoo J.", 2024,
                              "DDMI: Domain-Agnostic Latent Diffusion Models for Synthesizing High-Quality Implicit Neural Representations"),
    "arXiv:2106.09685": Paper("Hu, Edward J. and Shen, Yelong and Wallis, Phillip and Allen-Zhu, Zeyuan and Li, Yuanzhi and Wang, "
                              "Shean and Wang, Lu and Chen, Weizhu", 2022, "LoRA: Low-Rank Adaptation of Large Language Models"),
    "arXiv:2302.05543": Paper("Zhang, Lvmin and Rao, Anyi and Agrawala, Maneesh", 2023,
                              "Adding Conditional Control to Text-to-Image Diffusion Models"),
    "arXiv:2401.05252": Paper("Chen, Junsong and others", 2024,
                              "PixArt-delta: Fast and Controllable Image Generation with Latent Consistency Models"),
    "arXiv:2408.06070": Paper("Peng, Bohao and Wang, Jian and Zhang, Yuechen and Li, Wenbo and Yang, Ming-Chang and Jia, Jiaya", 2024,
                              "ControlNeXt: Powerful and Efficient Control for Image and Video Generation"),
    "arXiv:2312.11392": Paper("Jiang, Zeyinzi and Mao, Chaojie and Pan, Yulin and Han, Zhen and Zhang, Jingfeng", 2023,
                              "SCEdit: Efficient and Controllable Image Diffusion Generation via Skip Connection Editing"),
    "arXiv:2306.00964": Paper("Hu, Minghui and Zheng, Jianbin and Liu, Daqing and Zheng, Chuanxia and Wang, Chaoyue and Tao, "
                              "Dacheng and Cham, Tat-Jen", 2023, "Cocktail: Mixing Multi-Modality Controls for Text-Conditional Image Generation"),
    "arXiv:2208.01618": Paper("Gal, Rinon and Alaluf, Yuval and Atzmon, Yuval and Patashnik, Or and Bermano, Amit H. and Chechik, Gal "
                              "and Cohen-Or, Daniel", 2023,
                              "An Image is Worth One Word: Personalizing Text-to-Image Generation using Textual Inversion"),
    "arXiv:2208.12242": Paper("Ruiz, Nataniel and Li, Yuanzhen and Jampani, Varun and Pritch, Yael and Rubinstein, Michael and "
                              "Aberman, Kfir", 2023,
                              "DreamBooth: Fine Tuning Text-to-Image Diffusion Models for Subject-Driven Generation"),
    "xie2026divcontrol": Paper("Xie, Yucheng and Feng, Fu and Shi, Ruixiao and Wang, Jing and Rui, Yong and Geng, Xin", 2026,
                               "DivControl: Knowledge Diversion for Controllable Image Generation"),
    "arXiv:2412.08781": Paper("Tang, Yi and Sun, Peng and Cheng, Zhenglin and Lin, Tao", 2024,
                              "GMem: A Modular Approach for Ultra-Efficient Generative Models"),
    "arXiv:2510.12789": Paper("Li, Kevin and Brack, Manuel and Katakol, Sudeep and Ravi, Hareesh and Kale, Ajinkya", 2025,
                              "UniFusion: Vision-Language Model as Unified Encoder in Image Generation"),
    "arXiv:2312.03556": Paper("Xu, Jianjin and Motamed, Saman and Vaddamanu, Praneetha and Wu, Chen Henry and Haene, Christian and "
                              "Bazin, Jean-Charles and de la Torre, Fernando", 2023,
                              "Personalized Face Inpainting with Diffusion Models by Parallel Visual Attention"),
    "arXiv:2308.06721": Paper("Ye, Hu and Zhang, Jun and Liu, Sibo and Han, Xiao and Yang, Wei", 2023,
                              "IP-Adapter: Text Compatible Image Prompt Adapter for Text-to-Image Diffusion Models"),
    "arXiv:2412.20800": Paper("Wu, Shaojin and Ding, Fei and Huang, Mengqi and Liu, Wei and He, Qian", 2024,
                              "VMix: Improving Text-to-Image Diffusion Model with Cross-Attention Mixing Control"),
    "arXiv:2503.07027": Paper("Zhang, Yuxuan and Yuan, Yirui and Song, Yiren and Wang, Haofan and Liu, Jiaming", 2025,
                              "EasyControl: Adding Efficient and Flexible Control for Diffusion Transformer"),
    "arXiv:2301.07093": Paper("Li, Yuheng and Liu, Haotian and Wu, Qingyang and Mu, Fangzhou and Yang, Jianwei and Gao, Jianfeng and "
                              "Li, Chunyuan and Lee, Yong Jae", 2023, "GLIGEN: Open-Set Grounded Text-to-Image Generation"),
    "arXiv:2501.09194": Paper("Suleyman, Ahmad and Biricik, Goksel", 2025,
                              "Grounding Text-to-Image Diffusion Models for Controlled High-Quality Image Generation"),
    "arXiv:2407.15886": Paper("Chong, Zheng and Dong, Xiao and Li, Haoxiang and Zhang, Shiyue and Zhang, Wenqing and Zhang, Xujie and "
                              "Zhao, Hanqing and Jiang, Dongmei and Liang, Xiaodan", 2025,
                              "CatVTON: Concatenation Is All You Need for Virtual Try-On with Diffusion Models"),
    "arXiv:2310.06347": Paper("Zhang, Jingyang and Li, Shiwei and Lu, Yuanxun and Fang, Tian and McKinnon, David and Tsin, Yanghai and "
                              "Quan, Long and Yao, Yao", 2024,
                              "JointNet: Extending Text-to-Image Diffusion for Dense Distribution Modeling"),
    "arXiv:2410.11439": Paper("Li, Xirui and Herrmann, Charles and Chan, Kelvin C. K. and Li, Yinxiao and Sun, Deqing and Ma, Chao and "
                              "Yang, Ming-Hsuan", 2025, "A Simple Approach to Unifying Diffusion-based Conditional Generation"),
}  # fmt: skip


def catalogues() -> dict[str, dict[str, Card]]:
    """Every catalogue of diffjax by folder; a folder with several has one entry for each, `times.laws` for example."""
    found = {}
    for folder in FOLDERS:
        module = importlib.import_module(f"diffjax.{folder}")
        for name in dir(module):
            value = getattr(module, name)
            if (
                name.isupper()
                and isinstance(value, dict)
                and value
                and all(isinstance(c, Card) for c in value.values())
            ):
                found[folder if name == "CATALOGUE" else name.lower()] = value
    return found


def cite(*names: str) -> str:
    """BibTeX for catalogue entries by name, or for arXiv identifiers.

    Raises: ValueError: a name that no catalogue has.

    Example:
        >>> print(cite("ddim"))
        @misc{song2021denoising,
          author = {Song, Jiaming and Meng, Chenlin and Ermon, Stefano},
          title = {Denoising Diffusion Implicit Models},
          year = {2021},
          eprint = {2010.02502},
          archivePrefix = {arXiv},
        }
    """
    entries = {}
    known = {name: card for catalogue in catalogues().values() for name, card in catalogue.items()}
    for name in names:
        if name not in known and name not in PAPERS:
            raise ValueError(
                f"unknown method {name!r}; `diffjax list` shows the names, for example {sorted(known)[:5]}"
            )
        keys = known[name].paper.split() if name in known else [name]
        for key in keys:
            entries.setdefault(key.split("#")[0], None)
    return "\n".join(_bibtex(key, PAPERS[key]) for key in entries)


def _bibtex(key: str, paper: Paper) -> str:
    label = f"{paper.authors.split(',')[0].lower()}{paper.year}{paper.title.split()[0].strip(':').lower()}"
    fields = {"author": paper.authors, "title": paper.title, "year": paper.year}
    if key.startswith("arXiv:"):
        fields |= {"eprint": key.removeprefix("arXiv:"), "archivePrefix": "arXiv"}
    return "\n".join([f"@misc{{{label},", *(f"  {k} = {{{v}}}," for k, v in fields.items()), "}"])


def markdown() -> str:
    """The method table of the README: every catalogue, one row a method."""
    parts = []
    for folder, cards in catalogues().items():
        columns = {
            "order": lambda c: c.order,
            "evaluations a step": lambda c: c.evals,
            "noise": lambda c: "yes" if c.noise else None,
            "paper": lambda c: c.paper.replace("#", " ") or None,
        }
        used = {k: f for k, f in columns.items() if any(f(c) is not None for c in cards.values())}
        rows = [["name", "what", *used], ["---"] * (2 + len(used))]
        rows += [
            [f"`{name}`", card.summary, *("" if f(card) is None else str(f(card)) for f in used.values())]
            for name, card in cards.items()
        ]
        parts.append(f"**{folder}**\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows))
    return "\n\n".join(parts) + "\n"
