"""Methods that prune while training, as callbacks of training frameworks; each module needs its framework."""
