"""Options that name images and say how they are cut."""

from __future__ import annotations

from library.options.option import Group, Option, finite, path, switch

INTERPOLATIONS = ("lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area", "box")

GROUP = Group(
    "Dataset",
    (
        Option(
            "--dataset_config",
            "A TOML or JSON file that describes the datasets. The options below are the fallback of keys that it leaves out.",
            path,
        ),
        Option(
            "--train_data_dir",
            "A folder with subfolders such as 10_name, each with images that are repeated 10 times an epoch. With --in_json it is the folder that image names are relative to.",
            path,
        ),
        Option("--reg_data_dir", "A folder with subfolders such as 1_name that hold regularisation images.", path),
        Option("--in_json", "A metadata file (.json or .jsonl) that lists the images and their captions.", path),
        Option(
            "--dataset_repeats",
            "How often an image is seen in an epoch, where the dataset does not say it (num_repeats).",
            int,
            1,
        ),
        Option("--resolution", 'The training size in pixels: one number for a square, or "width,height".'),
        Option(
            "--train_batch_size",
            "How many images are in a batch, where the dataset does not say it (batch_size).",
            int,
            1,
        ),
        switch("--enable_bucket", "Sort images into buckets by their aspect ratio, so that little is cut off."),
        Option("--min_bucket_reso", "The shortest side of a bucket in pixels.", int, 256),
        Option("--max_bucket_reso", "The longest side of a bucket in pixels.", int, 1024),
        Option(
            "--bucket_reso_steps",
            "The sides of buckets are multiples of this number of pixels. It must be a multiple of 32.",
            int,
            64,
        ),
        switch(
            "--bucket_no_upscale",
            "Never enlarge an image to fit a bucket. The limits of the buckets' sides do not count then.",
        ),
        Option(
            "--resize_interpolation",
            "How images are resized. Unset, area is used for smaller and lanczos for larger.",
            str,
            None,
            INTERPOLATIONS,
        ),
        switch("--random_crop", "Cut images at a random place instead of their centre. Latents can't be cached then."),
        Option(
            "--face_crop_aug_range",
            'Cut images around a face whose place is told by the file name; the range of the face\'s share of the side, as in "0.3,0.6".',
        ),
        switch("--flip_aug", "Mirror each image left to right half of the time. Cached latents are kept for both."),
        switch("--color_aug", "Change hue or brightness a little at random. Latents can't be cached then."),
        switch("--alpha_mask", "Weigh the loss by each image's alpha channel: transparent parts do not count."),
        switch("--masked_loss", "Weigh the loss by masks: the images of conditioning_data_dir, or the alpha channel."),
        Option(
            "--conditioning_data_dir",
            "A folder of mask images, where the dataset does not say it: white parts count in full, black ones not at all. It needs --masked_loss.",
            path,
        ),
        Option("--prior_loss_weight", "The weight of regularisation images in the loss.", finite, 1.0),
        switch(
            "--cache_info",
            "Keep a list of images, sizes and captions in each folder, so that the next start is quicker. Changed files are read anew.",
        ),
        switch(
            "--skip_bad_images",
            "Leave out images that can't be read, with a warning, instead of stopping before training.",
        ),
        Option(
            "--max_data_loader_n_workers",
            "How many processes read images ahead; never more than the machine has cores.",
            int,
            8,
        ),
        switch(
            "--persistent_data_loader_workers",
            "Keep those processes between epochs, so that each epoch starts at once. They keep their memory, too.",
        ),
    ),
)
