"""The model card of an erasure: what was done, to which model, and what that does not show."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from erasure.concept import WORLD

if TYPE_CHECKING:
    from erasure.artifact.base import Erasure

TEMPLATE = """---
library_name: diffusers
base_model: {base}
base_model_relation: adapter
tags: [concept-erasure, diffusers, {method}]
---

# {name}

An erasure made with [diffusion-erasure](https://github.com/diffusion-erasure/erasure): it makes **{base}** stop drawing
**{concepts}** when asked by name.

```python
import erasure
from diffusers import StableDiffusionPipeline

pipe = {load}
erasure.Erasure.from_pretrained("path/to/this/folder").apply(pipe)
```

| | |
|---|---|
| method | {method} |
| kind | {kind} ({size:,} bytes) |
| concepts | {concepts} |
| kept | {keep} |
| library | diffusion-erasure {version} |

Settings: `{settings}`

## What this does and does not do

It changes weights so that prompts which name the concept lead elsewhere: that *suppresses* outputs. Whether the
information is *removed* from the weights is a different question, which needs different evidence (relearning,
inversion, comparison with a model retrained without the concept). Nothing in this file claims it. Filters at the
system level complement an erasure and do not replace it, nor it them.

Not assessed here: prompts that describe the concept without naming it, optimised attack prompts, other languages,
other samplers, fine-tuning afterwards, downstream harm. Run `erasure evaluate` and publish its table with the model.
"""


def card(erasure: Erasure) -> str:
    """Fill the card from the erasure's config."""
    config = erasure.config
    base = config["base"]["name"]
    return TEMPLATE.format(
        load="erasure.world.load()" if base == WORLD else f'StableDiffusionPipeline.from_pretrained("{base}")',
        name=erasure.name,
        base=base,
        method=config["method"],
        kind=erasure.kind,
        size=sum(tensor.numel() * tensor.element_size() for tensor in erasure.tensors.values()),
        concepts=", ".join(concept["name"] for concept in config["concepts"]),
        keep=", ".join(config["keep"]) or "nothing in particular",
        version=config["library_version"],
        settings=json.dumps(config["settings"], ensure_ascii=False),
    )
