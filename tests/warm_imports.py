"""What the processes of tests/warm_processes.py have imported before they are forked."""

import accelerate.commands.launch  # noqa: F401
import torch._dynamo
import torch.distributed.fsdp
import torch.distributed.launcher.api
import torch.distributed.run
import torch.utils.tensorboard  # noqa: F401
import transformers.models.clip.modeling_clip
import transformers.models.t5.modeling_t5  # noqa: F401

import sd3_train_network  # noqa: F401
