"""Options of the timesteps, of the loss and of validation."""

from __future__ import annotations

from library.options.option import Group, Option, finite

WEIGHTING_SCHEMES = ("sigma_sqrt", "logit_normal", "mode", "cosmap", "none", "uniform")

LOSS = Group(
    "Timesteps and loss",
    "タイムステップと損失",
    (
        Option(
            "--weighting_scheme",
            "How timesteps are drawn and how the loss is weighed by them. sigma_sqrt is the plain velocity loss; uniform, logit_normal and mode take the loss on the clean image.",
            "タイムステップの選び方と損失の重み。sigma_sqrtは速度(velocity)の損失そのもの、uniform、logit_normal、modeは元画像に対する損失です。",
            str,
            "uniform",
            choices=WEIGHTING_SCHEMES,
            in_metadata=True,
        ),
        Option(
            "--timestep_sampling",
            "How timesteps are drawn, apart from the loss. Unset, it is what --weighting_scheme says.",
            "タイムステップの選び方だけを指定します。未指定なら`--weighting_scheme`に従います。",
            choices=("uniform", "logit_normal", "mode", "cosmap"),
            in_metadata=True,
        ),
        Option(
            "--loss_weighting",
            "How the loss is weighed, apart from the timesteps: on the clean image (x0), on the velocity, or by a formula. Unset, it is what --weighting_scheme says. The SD3 paper's recipe is logit_normal with velocity.",
            "損失の重みだけを指定します。未指定なら`--weighting_scheme`に従います。SD3論文の方法はlogit_normalとvelocityです。",
            choices=("x0", "velocity", "sigma_sqrt", "cosmap"),
            in_metadata=True,
        ),
        Option(
            "--logit_mean",
            "The mean of the logit-normal density of timesteps. Above 0 there are more noisy ones.",
            "logit_normal分布の平均。0より大きいとノイズの多い側に寄ります。",
            finite,
            0.0,
            in_metadata=True,
        ),
        Option(
            "--logit_std",
            "The standard deviation of the logit-normal density of timesteps.",
            "logit_normal分布の標準偏差。",
            finite,
            1.0,
            in_metadata=True,
        ),
        Option(
            "--mode_scale",
            "The scale of the mode density of timesteps.",
            "mode分布のスケール。",
            finite,
            1.29,
            in_metadata=True,
        ),
        Option(
            "--training_shift",
            "Shifts the timesteps: above 1 there are more noisy ones.",
            "タイムステップのシフト。1より大きいとノイズの多い側に寄ります。",
            finite,
            1.0,
            in_metadata=True,
        ),
        Option(
            "--resolution_shift",
            "Shift the timesteps by each image's resolution as well, as the SD3 paper does.",
            "SD3論文のように、画像の解像度に応じてもタイムステップをシフトします。",
            bool,
            False,
            in_metadata=True,
        ),
        Option(
            "--min_timestep",
            "The lowest timestep that is trained, from 0 to 999. Unset, it is 0.",
            "学習する最小のタイムステップ(0〜999)。未指定なら0です。",
            int,
            in_metadata=True,
        ),
        Option(
            "--max_timestep",
            "The upper end of the timesteps that are trained, from 1 to 1000. Unset, it is 1000.",
            "学習するタイムステップの上限(1〜1000)。未指定なら1000です。",
            int,
            in_metadata=True,
        ),
        Option(
            "--loss_type",
            "The loss of one value: squared (l2), absolute (l1), or a mixture of them (huber, smooth_l1).",
            "損失の種類。二乗(l2)、絶対値(l1)、その混合(huber、smooth_l1)。",
            str,
            "l2",
            choices=("l1", "l2", "huber", "smooth_l1"),
            in_metadata=True,
        ),
        Option(
            "--huber_schedule",
            "How the threshold of huber and smooth_l1 depends on the timestep.",
            "huberとsmooth_l1のしきい値がタイムステップでどう変わるか。",
            str,
            "snr",
            choices=("constant", "exponential", "snr"),
            in_metadata=True,
        ),
        Option(
            "--huber_c",
            "The threshold of huber and smooth_l1: below it the loss is squared, above it absolute.",
            "huberとsmooth_l1のしきい値。下では二乗、上では絶対値になります。",
            finite,
            0.1,
            in_metadata=True,
        ),
        Option(
            "--huber_scale", "A factor on that threshold.", "そのしきい値に掛ける係数。", finite, 1.0, in_metadata=True
        ),
    ),
)

VALIDATION = Group(
    "Validation",
    "検証",
    (
        Option(
            "--validation_split",
            "The share of the images that is kept from training to validate on, from 0 to 1.",
            "検証用に学習から除く画像の割合(0〜1)。",
            finite,
            0.0,
            min=0,
            below=1,
            default_of="validation_split",
            in_metadata=True,
        ),
        Option(
            "--validation_seed",
            "The seed of that split and of the validation's noise. Unset, it is --seed.",
            "その分割と検証のノイズのシード。未指定なら`--seed`。",
            int,
            min=0,
            max=2**32 - 1,
            useless_without=("validation_split", "dataset_config"),
            default_of="validation_seed",
            in_metadata=True,
        ),
        Option(
            "--validate_every_n_steps",
            "Validate every N steps.",
            "Nステップごとに検証します。",
            int,
            zero_is_off=True,
            resume_safe=True,
            in_metadata=True,
        ),
        Option(
            "--validate_every_n_epochs",
            "Validate at the end of every Nth epoch. Unset, every epoch.",
            "Nエポックごとに検証します。未指定なら毎エポック。",
            int,
            zero_is_off=True,
            resume_safe=True,
            in_metadata=True,
        ),
        Option(
            "--max_validation_steps",
            "The most batches that one validation takes. Unset, all.",
            "1回の検証で使うバッチ数の上限。未指定なら全部。",
            int,
            min=1,
            resume_safe=True,
            in_metadata=True,
        ),
    ),
)
