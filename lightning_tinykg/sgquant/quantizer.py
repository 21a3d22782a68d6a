"""``SGQuantizer``: a model whose stored tensors are quantized by layer, component and node degree, in simulation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.nn import MessagePassing

from lightning_tinykg.arguments import check_whole
from lightning_tinykg.bits.plan import BitPlan
from lightning_tinykg.sgquant.agreeing import NoMessagesError, Report, agreed_points, agreed_sites, raise_failures
from lightning_tinykg.sgquant.granularity import DegreeBuckets
from lightning_tinykg.sgquant.graphs import Graph, Graphs
from lightning_tinykg.sgquant.places import Granularity, Places
from lightning_tinykg.sgquant.protecting import check_protect, protected_nodes
from lightning_tinykg.sgquant.quantize import fake_quantize
from lightning_tinykg.sgquant.ranges import Range
from lightning_tinykg.sgquant.repeats import Repeats
from lightning_tinykg.sgquant.shares import divisors
from lightning_tinykg.sgquant.sites import Observer, Site
from lightning_tinykg.sgquant.substitutes import dropped_from, shadow_parameter, unshadow
from lightning_tinykg.sgquant.wiring import Meeting, Spot, Wiring

__all__ = ["NoMessagesError", "SGQuantizer"]


class SGQuantizer(Places):
    """Simulates a GNN whose tensors are stored in few bits: SGQuant (Feng et al., ICTAI 2020, arXiv 2007.05100).

    A **place** is where a tensor is stored: a layer (a PyG message passing module, or a linear layer outside of these
    that takes node features), a component of it (`COMPONENTS`), and a bucket of node degrees. A plan gives each place
    its width. A tensor that is met at several places is stored once, at the first: a layer's output that is the next
    one's input, edge weights that all layers share. One that is a parameter, such as an embedding table, is read as it
    is stored wherever the model reads it.

    `calibrate` finds the places and their ranges in a forward. `attach` (or `with quantizer:`) puts the quantization
    in, `detach` takes it out and leaves nothing behind: attached, the model can't be copied or pickled, its state dict
    is the same at any time. In training gradients pass straight through, but not where a value was clipped.

    Args:
        model: Any module with message passing layers.
        plan: Widths of the places, 1 to 8, 16 and 32; a number for all, or a path of a saved plan.
        buckets: `DegreeBuckets`; a number of buckets, by quantile; split points; `None`: one for all degrees.
        range: How calibration finds ranges: `"mse"`, `"minmax"`, `"percentile"` or `"ema"`, see `Observed`. At 1 and 2
            bits the least and greatest value are poor levels.
        percentile: Share of the values below the upper end, for `range="percentile"`.
        granularity: What has a range of its own: `"tensor"`, `"bucket"`, `"channel"` (an element of the rows; edges go
            by tensor then), or `"node"`, whose range is that of its row as it is stored, for 8 bytes a row (edges go by
            bucket then). `"auto"` is `"node"` for rows of at least 128 elements, `"channel"` for narrower ones where
            they are at least 1024, and `"tensor"` for the rest. Coefficients that sum to 1 over a receiver's edges are
            multiples of what the degrees alone would give, in any case; see `shares.py`.
        protect: Least and greatest probability with which a node is left as it is in training, see `protection`.
        seed: Of the nodes so protected.

    Raises:
        ValueError: If an argument has a value it can't have, the model has no message passing layers, or the plan names
            what there is not.

    Example:
        >>> from torch_geometric.nn import GCN
        >>> model = GCN(4, 8, num_layers=2, out_channels=2).eval()
        >>> x, edge_index = torch.randn(5, 4), torch.tensor([[1, 2, 3], [0, 0, 4]])
        >>> quantizer = SGQuantizer(model, plan=4)
        >>> quantizer.calibrate(lambda: model(x, edge_index))
        >>> with quantizer:
        ...     quantized = model(x, edge_index)
        >>> bool(torch.equal(quantized, model(x, edge_index))), quantizer.memory().average_bits
        (False, 4.0)
    """

    def __init__(
        self,
        model: nn.Module,
        plan: BitPlan | int | str | Path = 8,
        *,
        buckets: DegreeBuckets | int | Sequence[int] | None = 4,
        range: Range = "mse",
        percentile: float = 0.999,
        granularity: Granularity = "auto",
        protect: tuple[float, float] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(model, plan, buckets, range, percentile, granularity)
        self.model, self.protect, self.seed, self.step = model, check_protect(protect), check_whole("seed", seed), 0
        self.gather: Callable[[Report], list[Report]] | None = None
        """Gives each rank what all of them saw; `None`: there is one rank."""
        self.graphs = Graphs()
        self._wiring: Wiring | None = None
        self._shadowed: list[nn.Module] = []
        self._repeats = Repeats()
        self._masks: dict[int, tuple[Tensor, Tensor]] = {}

    # -- calibration -------------------------------------------------------------------------------------------------

    def calibrate(self, run: Callable[[], object], more: bool = False) -> None:
        """Find the places, and the range of each.

        The model is in evaluation meanwhile, without gradient; its modes and torch's random state are as before when it
        is over. Buckets by quantile are those of the first graph, and stay.

        Args:
            run: Does one forward of the model, or several.
            more: Add to what earlier calibrations saw, instead of forgetting it.

        Raises:
            NoMessagesError: If `run` called no message passing layer.
            ValueError: If a value is not finite.
        """
        was_attached = self.is_attached
        self.detach()
        before = self.sites, self.points
        if not more:
            self.points = ()
        earlier = self.sites if more else {}
        try:
            sites = self._observe(run, earlier) if self.gather is None else self._observe_together(run, earlier)
            self.sites, self._levels = sites, {}
        except BaseException:
            self.sites, self.points = before
            raise
        finally:
            if was_attached:
                self.attach()

    def _observe_together(self, run: Callable[[], object], earlier: dict[Spot, Site]) -> dict[Spot, Site]:
        """As `_observe`, on all ranks: whatever one of them meets, and fails in, the others don't wait for."""
        assert self.gather is not None
        before = self.points
        while True:
            report = Report(self.points, {})
            try:
                report.sites = self._observe(run, earlier)
            except Exception as error:  # raised on all ranks
                report.failure = error
            report.points = self.points
            reports = self.gather(report.to_send())
            raise_failures(report, reports)
            self.points = agreed_points(reports)
            if before or all(other.points in ((), self.points) for other in reports):
                return agreed_sites(report.sites, reports)
            before = self.points  # the buckets were other ones: once more

    def _observe(self, run: Callable[[], object], earlier: dict[Spot, Site]) -> dict[Spot, Site]:
        """What a run of the model meets."""
        observer = Observer(self.model, self._new_range, self._bucket_of, earlier)
        with ExitStack() as stack:
            for context in (_in_evaluation(self.model), _with_random_state(self.model), torch.inference_mode(False)):
                stack.enter_context(context)
            stack.enter_context(torch.no_grad())
            wiring = Wiring(self.model, observer, self.graphs, end=lambda: observer.settle(self.graphs.last))
            stack.callback(wiring.remove)
            run()
        observer.finish()
        if not any(isinstance(self._layers[spot.layer], MessagePassing) for spot in observer.sites):
            raise NoMessagesError("run must call the model's message passing layers, got one that called none")
        return observer.sites

    def _bucket_of(self, graph: Graph, rows: int, end: int) -> Tensor | None:
        """Bucket of each node; `None`: there are no buckets, or it is another graph's nodes."""
        degrees = graph.degrees(rows, end)
        if self.buckets is None or degrees is None:
            return None if degrees is None else torch.zeros_like(degrees)
        if self.buckets.count > 1 and not self.points:
            self.points = tuple(self.buckets.points(degrees))
        return graph.buckets(self.points, rows, end)

    # -- in the model ------------------------------------------------------------------------------------------------

    @property
    def is_attached(self) -> bool:
        """Whether the model is quantized now."""
        return self._wiring is not None

    def attach(self) -> None:
        """Quantize the model from now on. Once is enough.

        Raises:
            RuntimeError: If there was no calibration.
        """
        self._need_calibration()
        if self._wiring is not None:
            return
        self._wiring = Wiring(self.model, self._visit, self.graphs, begin=self._begin)
        for site in self.sites.values():
            if site.parameter is not None:
                self._shadow(site, *site.parameter.rpartition(".")[::2])

    def detach(self) -> None:
        """Leave the model as it was."""
        if self._wiring is not None:
            self._wiring.remove()
            for module in self._shadowed:
                unshadow(module)
        self._wiring, self._shadowed = None, []
        self._masks.clear()
        self._repeats.clear()

    def __enter__(self) -> SGQuantizer:
        self.attach()
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def _shadow(self, site: Site, path: str, name: str) -> None:
        module = self.model.get_submodule(path)

        def stored(rows: Tensor, index: Tensor | None) -> Tensor:
            return self._store_parameter(site, rows, index, module.training)

        shadow_parameter(module, name, stored)
        self._shadowed.append(module)

    def _begin(self, training: bool) -> None:
        if training and self.protect is not None:
            self.step += 1
            self._masks.clear()

    def _visit(self, spot: Spot, x: Tensor, meeting: Meeting) -> Tensor:
        site = self.sites.get(spot)
        if site is None or site.is_stored or self.sites[site.owner].parameter is not None or x.size(0) == 0:
            return x
        if all(level.bits == 32 for level in self.levels(spot)):
            return x
        dropped = dropped_from(x)
        if dropped is not None:  # what is stored is the tensor before the dropout
            return self._store(spot, dropped[0], meeting) * dropped[1]
        return self._store(spot, x, meeting)

    def _store(self, spot: Spot, x: Tensor, meeting: Meeting) -> Tensor:
        levels, bucket, protected, divisor = self.levels(spot), None, None, None
        share = next((level.share for level in levels if level.share), None)
        if meeting.receivers is not None and share is not None:
            divisor = divisors(share, meeting.receivers, meeting.senders, meeting.rows)
        protects = self.protect is not None and meeting.layer.training
        if len(levels) > 1 or protects:
            graph, of_edges = meeting.graph, meeting.receivers is not None
            rows = x.size(0)
            if of_edges and graph is not None:
                rows = meeting.rows
            degrees = None if graph is None else graph.degrees(rows, meeting.end)
            if graph is None or degrees is None:
                raise RuntimeError(
                    f"{spot} needs the degrees of its {rows} nodes, and no graph of so many is known: give the model "
                    "edge_index as an argument of its forward, or a plan and ranges that are the same for all degrees"
                )
            bucket = graph.buckets(self.points, rows, meeting.end) if len(levels) > 1 else None
            protected = self._protected(degrees) if protects else None
            if meeting.receivers is not None:
                bucket, protected = (None if v is None else v[meeting.receivers] for v in (bucket, protected))
        if protected is not None:
            return fake_quantize(x, levels, bucket, protected, divisor)
        circumstances = levels, None if bucket is None and divisor is None else meeting.graph
        return self._repeats.of(spot, x, circumstances, lambda x: fake_quantize(x, levels, bucket, None, divisor))

    def _store_parameter(self, site: Site, rows: Tensor, index: Tensor | None, training: bool) -> Tensor:
        levels, bucket, protected = self.levels(site.spot), None, None
        protects = self.protect is not None and training
        if (len(levels) > 1 or protects) and site.degrees is not None:
            # a table's rows keep the degrees that they had in the calibration: it is the table that is stored
            degrees = site.degrees = site.degrees.to(rows.device)
            protected = self._protected(degrees) if protects else None
            bucket = DegreeBuckets.of(degrees, self.points) if len(levels) > 1 else None
            if index is not None:
                bucket, protected = (None if v is None else v[index] for v in (bucket, protected))
        return fake_quantize(rows, levels, bucket, protected)

    def _protected(self, degrees: Tensor) -> Tensor:
        assert self.protect is not None
        if id(degrees) not in self._masks:  # held, so that the id stays its own
            mask = protected_nodes(degrees, self.protect, self.seed, self.step)
            self._masks[id(degrees)] = degrees, mask
        return self._masks[id(degrees)][1]

    # -- in and out --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plan, places, ranges, degree buckets and the step, in tensors and primitives."""
        return {**super().state_dict(), "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            ValueError: If it was taken of a quantizer with other options, or of another model.
        """
        was_attached = self.is_attached
        self.detach()
        super().load_state_dict(state)
        self.step = int(state["step"])
        if was_attached and self.is_calibrated:
            self.attach()


@contextmanager
def _in_evaluation(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _with_random_state(model: nn.Module) -> Iterator[None]:
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=[device.index for device in devices if device.index is not None]):
        yield
