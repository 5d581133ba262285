"""Real pretrained models and real data for benchmarks and tests; imports nothing of Secateur.

Every function named after a model returns a fresh one with pretrained weights in evaluation mode. Every
batch is a pair `(inputs, target)` for `loss(model(inputs), target)`; in inputs and target, an index of
dimension 0 is an example, independent of the others, so slicing dimension 0 gives per-example gradients:

| model | data | loss |
| --- | --- | --- |
| `resnet20()` | `cifar10` | `torch.nn.functional.cross_entropy` |
| `lenet300()`, `lenet5()` | `fashion_mnist` | `torch.nn.functional.cross_entropy` |
| `StsModel(minilm())` | `stsb` | `sts_loss` |
| `stories260k()` | `stories` | `next_token_loss` |
| `smollm2()` | WikiText-2 | `next_token_loss` |

`calibration(name, n, batch)` gives such batches, from training data only.
"""

from .calibrate import calibration
from .evaluate import accuracy, evaluating
from .language import (
    next_token_loss,
    smollm2,
    stories,
    stories260k,
    stories_nll,
    wikitext2_perplexity,
)
from .nets import LeNet5, LeNet300, ResNet20, lenet5, lenet300, resnet20
from .root import data_root
from .sentences import (
    StsModel,
    banking77,
    banking77_accuracy,
    banking77_head,
    encode,
    minilm,
    sts_inputs,
    sts_loss,
    sts_spearman,
    stsb,
)
from .vision import cifar10, fashion_mnist

__all__ = [
    "LeNet5",
    "LeNet300",
    "ResNet20",
    "StsModel",
    "accuracy",
    "banking77",
    "banking77_accuracy",
    "banking77_head",
    "calibration",
    "cifar10",
    "data_root",
    "encode",
    "evaluating",
    "fashion_mnist",
    "lenet5",
    "lenet300",
    "minilm",
    "next_token_loss",
    "resnet20",
    "smollm2",
    "stories",
    "stories260k",
    "stories_nll",
    "sts_inputs",
    "sts_loss",
    "sts_spearman",
    "stsb",
    "wikitext2_perplexity",
]
