"""GreenTrainer: train the tensors that are worth most within a share of what a full step costs.

    maximise    Σ importance of the trained tensors
    subject to  forward + their gradients + the error down to them  <=  rho × the step that trains everything

A tensor's importance is how much of the loss its updates are about to take away. Costs are counted in FLOPs
(:mod:`peftkern.select.record`), as in the paper, or measured in seconds (:mod:`peftkern.select.timing`). The choice is
the best one there is (:mod:`peftkern.select.solver`), and what was not chosen costs nothing until the next one
(:mod:`peftkern.select.execution`).

Source: GreenTrainer, Huang et al. 2024 (arXiv:2309.13192), section 3. Its published code chooses by a dynamic programme
that misses the optimum and can exceed the budget, and its probe leaves two updates behind in the optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftkern.select.cost_graph import UNITS, CostGraph
from peftkern.select.method import logger
from peftkern.select.policy import Policy
from peftkern.select.probe import KINDS, Loss, Scores, probe
from peftkern.select.record import record
from peftkern.select.selection import Selection
from peftkern.select.solver import solve
from peftkern.select.timing import measure

_PROBED = tuple(kind for kind in KINDS if kind != "weight_change")  # what a batch and an optimizer are enough for
TIMED = 1
"""How many times steps are timed for a budget in seconds: about three in all, which the first interval has to earn."""


class GreenTrainer(Policy):
    """Train what is worth most within a share of the full step's cost, and choose again from time to time.

        Trainer(model, ..., callbacks=[peftkern.GreenTrainer(rho=0.5)]).train()

    Costs are found on the first batch; batches of another shape change them nearly in proportion. A selection then
    costs one probe: two forward and two backward passes on ``sample`` of a batch. It works on everything that requires
    a gradient when training begins: all of a dense model, adapters over a quantized one, sparse deltas.

    Args:
        rho: share of the cost of the full step, its forward pass included; above 0 and at most 1. The forward pass
            alone is a third of the FLOPs of full fine-tuning.
        interval: selections are this far apart; ``None``: one for the whole run.
        interval_unit: ``"steps"``, which are updates, or ``"epochs"``.
        budget: what ``rho`` is a share of: ``"flops"`` (the published form) or ``"seconds"`` on this machine, the
            optimizer's update included, which a few passes measure when training begins.
        importance: one of ``"update"`` (the published form), ``"first_order"`` (half its cost), ``"fisher"`` and
            ``"gradient_norm"``; or importances of one's own by the names of parameters, or a function that gives them
            for ``(model, batch)``. See `peftkern.select.probe`.
        sample: share of a batch's rows that the probe looks at.
        seed: by which they are drawn.
        loss: gives the loss of ``(model, batch)`` where it is not ``model(**batch).loss``.

    Attributes:
        costs: by unit, after the first selection.
        importances: of all candidates, at the last selection.

    Raises:
        ValueError: an argument is none of these.
    """

    def __init__(
        self,
        rho: float = 0.5,
        interval: int | None = 100,
        interval_unit: str = "steps",
        budget: str = "flops",
        importance: str | Scores = "update",
        sample: float = 0.25,
        seed: int = 0,
        loss: Loss | None = None,
    ) -> None:
        super().__init__(interval, interval_unit)
        if not 0 < rho <= 1:
            raise ValueError(f"GreenTrainer: rho must be above 0 and at most 1, got {rho}")
        if not 0 < sample <= 1:
            raise ValueError(f"GreenTrainer: sample must be above 0 and at most 1, got {sample}")
        if budget not in UNITS:
            raise ValueError(f"GreenTrainer: budget must be one of {list(UNITS)}, got {budget!r}")
        if isinstance(importance, str) and importance not in _PROBED:
            raise ValueError(
                f"GreenTrainer: importance must be one of {list(_PROBED)}, a mapping or a function; got {importance!r}"
            )
        self.rho, self.budget, self.importance, self.sample, self.seed = rho, budget, importance, sample, seed
        self.costs: dict[str, CostGraph] = {}
        self.importances: dict[str, float] = {}
        self._loss = loss

    def observe(self, batch: Mapping[str, Any]) -> None:
        """Find the costs, the first time (a checkpoint holds them), and the importances.

        Raises:
            ValueError: the loss depends on no candidate, or all importances are 0; see `record` and `probe`.
        """
        model, optimizer = self.prepared(), self.started()
        if not self.costs:
            self.costs = dict(self.known_costs()) or self._find_costs(batch)
        self.importances = probe(
            model,
            batch,
            self.candidates,
            optimizer,
            self.importance,
            self.sample,
            self.seed + self.steps_done,  # another part of the batch each time
            self._loss,
        )

    def select(self) -> Selection:
        """The most important tensors within the budget.

        Raises:
            BudgetError: there is nothing that ``rho`` is enough for; the message names what would be.
            ValueError: training any tensor is expected to raise the loss.
        """
        graph = self.costs[self.budget]
        solution = solve(graph, self.importances, graph.backward_budget(self.rho))
        if not solution.names:
            raise ValueError(
                "GreenTrainer: no importance is above 0, so training any tensor is expected to raise the loss; "
                "lower the learning rate, or use importance='gradient_norm'"
            )
        if not solution.proven:
            logger.warning(
                "GreenTrainer: the search was stopped at %.3g of importance; the best is at most %.3g",
                solution.importance,
                solution.bound,
            )
        return self.selected(solution.names, importances=self.importances, costs=self.costs)

    def _find_costs(self, batch: Mapping[str, Any]) -> dict[str, CostGraph]:
        model = self.prepared()
        flops = record(model, batch, candidates=self.candidates, loss=self._loss)
        if self.budget == "flops":
            return {"flops": flops}
        return {
            "flops": flops,
            "seconds": measure(model, batch, flops, self.started(), loss=self._loss, repeats=TIMED),
        }
