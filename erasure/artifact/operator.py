"""Closed forms: a low-rank matrix multiplied onto the layers that read the prompt."""

from __future__ import annotations

import functools
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor

from erasure.artifact.base import Erasure, WeightErasure
from erasure.artifact.config import Config
from erasure.backbone import Backbone, Space
from erasure.backbone.fingerprint import fingerprint
from erasure.io import shown

BLOCKS = 16  # parts of a layer that are edited one after the other, so that it never takes twice its memory


class OperatorErasure(WeightErasure):
    """``W' = W (I + s U V^T)`` for every edited text site, with ``U, V`` of shape ``(d, n)``: d the width of the text
    embeddings, n at most the number of edited embeddings. Its size is that of ``U`` and ``V``, whatever the number of
    layers: kilobytes where one token is moved, megabytes where all those of several prompts are (``recommended``).

    For each edited embedding ``U`` holds where it is moved (anchor minus target), ``V`` how strongly any embedding
    takes part; where fewer columns say the same, they are combinations of these.

    Tensors are called ``hidden.u`` and ``hidden.v``, with ``pooled.u`` and ``pooled.v`` beside them where pooled
    embeddings are edited too. A method that solves for each layer on its own adds ``<site>.v``, which takes the place
    of the shared one at that site. ``config["spaces"]`` lists the sites of each space, and the columns they read the
    embedding from where that is not all of them.
    """

    kind: ClassVar[str] = "operator"

    @property
    def spaces(self) -> dict[str, Any]:
        """Space to the ``sites`` that read it and the ``columns`` they read it from."""
        return self.config.spaces or {}

    @functools.cached_property
    def site_spaces(self) -> dict[str, str]:
        """Site to the space of the embeddings it reads."""
        return {site: space for space, facts in self.spaces.items() for site in facts["sites"]}

    @property
    def parameter_names(self) -> tuple[str, ...]:
        return tuple(f"{site}.weight" for site in self.site_spaces)

    def factors(self, site: str) -> tuple[Tensor, Tensor]:
        """``U, V`` of one site."""
        space = self.site_spaces[site]
        own = f"{site}.v"
        return self.tensors[f"{space}.u"], self.tensors[own if own in self.tensors else f"{space}.v"]

    def columns(self, site: str) -> slice:
        """The input columns of a site that read the embedding."""
        return slice(*(self.spaces[self.site_spaces[site]]["columns"] or (None,)))

    def edit(self, name: str, weight: Tensor, scale: float) -> Tensor:
        site = name.removesuffix(".weight")
        columns = self.columns(site)
        edited, part = weight.clone(), weight[:, columns]
        precise = torch.promote_types(weight.dtype, torch.float32)
        # flattened and back: one memory layout, so that an erasure read from its file gives the same bits
        u, v = (factor.to(weight.device, precise).flatten().view(factor.shape) for factor in self.factors(site))
        rows = max(len(weight) // BLOCKS, 1)
        for block, out in zip(part.split(rows), edited[:, columns].split(rows), strict=True):
            w = block.to(precise)
            out.copy_(torch.addmm(w, w @ u, v.T, alpha=scale))
        return edited

    def fits(self, name: str, shape: tuple[int, ...]) -> bool:
        site = name.removesuffix(".weight")
        u, v = self.factors(site)
        stop, paired = self.columns(site).stop, u.dim() == 2 and u.shape == v.shape
        return paired and len(shape) == 2 and (len(u) == shape[1] if stop is None else stop <= shape[1])

    def transfers(self, backbone: Backbone) -> bool:
        """It is a map of the text, so yes, where the layers that read the text are known to be the same."""
        made_for = self.config.base.components.get(backbone.denoiser_name)
        known = made_for is not None and made_for.layout == fingerprint(backbone.denoiser)["layout"]
        return known or all(
            space in backbone.spaces and set(facts["sites"]) == set(backbone.text_sites(space))
            for space, facts in self.spaces.items()
        )

    def map(self, embeddings: Tensor, space: Space = "hidden", scale: float | Tensor = 1.0) -> Tensor:
        """``x -> (I + s U V^T) x``: the edit made on the embeddings instead of on the weights that read them.

        Args:
            embeddings: ``(..., d)``.
            scale: one number, or a tensor that broadcasts against the embeddings: one scale a row, say.

        Raises:
            ValueError: each layer has a factor of its own, or the space is not edited, or has another width.
        """
        if f"{space}.v" not in self.tensors or any(f"{site}.v" in self.tensors for site in self.site_spaces):
            raise ValueError(
                f"{self.name!r} is no one map of the {space} embeddings (another space, or a factor for each layer); "
                "apply it to the weights instead"
            )
        precise = torch.promote_types(embeddings.dtype, torch.float32)
        u, v = (self.tensors[f"{space}.{factor}"].to(embeddings.device, precise) for factor in ("u", "v"))
        if embeddings.shape[-1] != len(u):
            raise ValueError(
                f"{self.name!r} maps {space} embeddings of width {len(u)}; got {tuple(embeddings.shape)}; wrong model"
            )
        x = embeddings.to(precise)
        return (x + scale * ((x @ v) @ u.T)).to(embeddings.dtype)

    def compose(self, other: Erasure) -> OperatorErasure:
        """``(I + U1 V1^T)(I + U2 V2^T)`` as one pair of factors.

        Not the joint solve: where two erasures overlap, the second acts on what the first left.
        :func:`erasure.resolve` solves jointly.
        """
        self.check_same_base(other)
        own_factors = any(f"{site}.v" in edit.tensors for edit in (self, other) for site in self.site_spaces)
        if not isinstance(other, OperatorErasure) or self.spaces != other.spaces or own_factors:
            raise ValueError(
                f"{self.name!r} and {other.name!r} edit different layers; apply them one after the other instead"
            )
        tensors = {}
        for space in self.spaces:
            u1, v1 = (self.tensors[f"{space}.{factor}"].double() for factor in ("u", "v"))
            u2, v2 = (other.tensors[f"{space}.{factor}"].double() for factor in ("u", "v"))
            tensors[f"{space}.u"] = torch.cat([u1, u2 + u1 @ (v1.T @ u2)], dim=1).float()
            tensors[f"{space}.v"] = torch.cat([v1, v2], dim=1).float()
        return OperatorErasure(f"{self.name}+{other.name}", Config.of(self._composed_config(other)), tensors)

    def check_tensors(self) -> None:
        spaces = self.config.spaces
        if not spaces or not all(map(_is_space, spaces.items())):
            raise ValueError(
                "an operator erasure's config lists the layers of its spaces; 'spaces' is missing or malformed; "
                "get it again"
            )
        sites = self.site_spaces
        if len(sites) != sum(len(facts["sites"]) for facts in spaces.values()):
            raise ValueError("a layer is listed twice in the config's spaces; the file was altered; get it again")
        self._check_factors(sites)
        self._check_system()

    def _check_factors(self, sites: dict[str, str]) -> None:
        spaces = self.spaces
        shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        allowed = {f"{space}.{factor}" for space in spaces for factor in ("u", "v")} | {f"{site}.v" for site in sites}
        missing = {f"{space}.u" for space in spaces} - set(shapes)
        missing |= {f"{s}.v" for s, space in sites.items() if f"{space}.v" not in shapes and f"{s}.v" not in shapes}
        wrong = [n for n, shape in shapes.items() if n in allowed and shape != shapes.get(f"{self._space_of(n)}.u")]
        narrow = [
            space
            for space, facts in spaces.items()
            if (at := facts["columns"]) and shapes.get(f"{space}.u", (0,))[0] != at[1] - at[0]
        ]
        flat = any(len(shape) != 2 or 0 in shape for shape in shapes.values())
        if missing or wrong or narrow or flat or set(shapes) - allowed:
            raise ValueError(
                f"an operator erasure holds u and v of one shape (d, n) for each space; got {shown(shapes)}; "
                "not such a file"
            )

    def _check_system(self) -> None:
        if not self.system:
            return
        facts = self.config.system
        if facts is None or set(facts) != set(self.spaces):
            raise ValueError("the config says nothing of the system beside it; the file was altered; get it again")
        for space, fact in facts.items():
            if not _is_system(fact):
                raise ValueError(f"the config's system of {space} is malformed; the file was altered; get it again")
            width = len(self.tensors[f"{space}.u"])
            shapes = dict.fromkeys((f"{space}.targets", f"{space}.anchors"), (sum(fact["rows"]), width))
            found = {n: tuple(t.shape) for n, t in self.system.items() if n.startswith(f"{space}.")}
            for name in (
                f"{space}.kept.{i}" for i in range(min(fact["kept"], len(self.system) + 1))
            ):  # a matrix, or rows: at most d of them
                rows = min(found.get(name, (width,))[0], width)
                shapes[name] = (rows, width)
            if found != shapes:
                raise ValueError(
                    f"a system of {space} holds {shown(shapes)}; got {shown(found)}; the file was altered; get it again"
                )
        if extra := [name for name in self.system if name.split(".")[0] not in facts]:
            raise ValueError(
                f"tensors of no space in the system; got {shown(extra)}; the file was altered; get it again"
            )

    def _space_of(self, tensor: str) -> str:
        stem = tensor.rpartition(".")[0]
        return self.site_spaces.get(stem, stem)


def space_config(backbone: Backbone, space: Space, names: list[str] | None = None) -> dict[str, Any]:
    """The entry of ``config["spaces"]`` for all sites of a space, or for those named."""
    sites = backbone.text_sites(space)
    columns = next(iter(sites.values())).columns  # one for all sites of a space
    return {"sites": list(sites) if names is None else names, "columns": list(columns) if columns else None}


def _is_space(entry: tuple[str, Any]) -> bool:
    """Whether an entry of a config's ``spaces`` is what :func:`space_config` writes."""
    name, facts = entry
    if name not in get_args(Space) or not isinstance(facts, dict) or set(facts) != {"sites", "columns"}:
        return False
    sites, columns = facts["sites"], facts["columns"]
    named = isinstance(sites, list) and len(sites) > 0 and all(isinstance(site, str) for site in sites)
    pair = isinstance(columns, list) and len(columns) == 2 and all(type(column) is int for column in columns)
    return named and (columns is None or pair and 0 <= columns[0] < columns[1])


def _is_system(fact: Any) -> bool:
    """Whether an entry of a config's ``system`` is what a closed form writes."""
    if not isinstance(fact, dict) or not {"lamb", "rows", "kept"} <= set(fact) or not isinstance(fact["rows"], list):
        return False
    counts = [fact["kept"], *fact["rows"]]
    lamb = fact["lamb"]
    return all(type(n) is int and 0 < n < 2**31 for n in counts) and type(lamb) in (int, float) and 0 <= lamb < 1e300
