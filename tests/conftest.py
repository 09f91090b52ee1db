"""For all files here, before any of them imports a library that reads it: no hub, and no threads of tokenizers in forks."""

import os

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
