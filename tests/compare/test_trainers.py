"""Trainers of optimizers that need a closure or have a loop of their own, chains of them, and how they are named."""

from __future__ import annotations

import copy
import dataclasses
import gc
import threading

import pytest
import torch
from task_runs import losses, problem_of, train

from descend.compare import specs
from descend.compare.handoff import End, Iterate, Report, SolverTrainer
from descend.compare.problem import Problem
from descend.compare.tasks import digits, regression
from descend.compare.tasks.rates import LIKE_ADAM, LIKE_SGD, rates
from descend.compare.tasks.task import Batch
from descend.reporting.errors import UsageError

BATCH = torch.zeros(1), torch.zeros(1)


@pytest.fixture(scope="module")
def full() -> Problem:
    return problem_of(regression.TASK)


def count_down(batch: Batch, report: Report) -> End:
    for i in range(3):
        report(Iterate(10.0 - i, 2 * i + 1))
    return End("done", 6)


def test_solver_takes_one_iteration_a_step() -> None:
    trainer = SolverTrainer(lambda batch: 11.0, count_down)
    steps = []
    while not trainer.stopped:
        steps.append(trainer.step(BATCH))
    assert [(step.loss, step.evaluations) for step in steps] == [(11.0, 1), (10.0, 2), (9.0, 2), (8.0, 1)]
    assert trainer.stopped == "done"


def test_solver_that_raises_raises_in_the_step() -> None:
    def solve(batch: Batch, report: Report) -> End:
        report(Iterate(1.0, 1))
        raise ZeroDivisionError("why")

    trainer = SolverTrainer(lambda batch: 2.0, solve)
    trainer.step(BATCH)
    with pytest.raises(ZeroDivisionError, match="why"):
        trainer.step(BATCH)


def test_solver_nobody_needs_ends() -> None:
    ended = threading.Event()

    def solve(batch: Batch, report: Report) -> End:
        try:
            while True:
                report(Iterate(1.0, 1))
        finally:
            ended.set()

    trainer = SolverTrainer(lambda batch: 2.0, solve)
    trainer.step(BATCH)
    assert not ended.is_set()
    del trainer
    gc.collect()
    assert ended.wait(10)


@pytest.mark.parametrize("text", ["lbfgs", "torch.lbfgs", "lbfgs:line_search_fn=strong_wolfe,max_iter=3", "newton"])
def test_closures_work_on_batches(text: str) -> None:
    problem = problem_of(digits.TASK)
    steps, trainer, _ = train(problem, text, 4)
    assert len(steps) == 4
    assert trainer.stopped is None
    assert all(step.evaluations >= 2 for step in steps)
    assert min(losses(steps)[1:]) < steps[0].loss
    assert steps[0].loss == train(problem, "sgd", 1)[0][0].loss
    assert {"forward", "optimizer"} <= steps[0].parts.keys()


def test_a_point_is_evaluated_once(full: Problem) -> None:
    """The end of a step is the start of the next: without a memory, each step would take one evaluation more."""
    [spec] = specs.parse_all(["lbfgs"], {})
    model = torch.nn.Linear(64, 10, dtype=torch.float64)
    trainer = spec.trainer(model, full)
    points = []
    model.register_forward_hook(lambda *_: points.append(model.weight.detach().clone()))
    steps = [trainer.step(full.data.sample(0, torch.Generator())) for _ in range(8)]
    assert len(points) == sum(step.evaluations for step in steps)
    assert all(not torch.equal(a, b) for i, a in enumerate(points) for b in points[:i])


def test_chain_changes_over_and_goes_on(full: Problem) -> None:
    chained, trainer, _ = train(full, "adam:steps=5+sgd:lr=0.1,steps=3+lbfgs", 200)
    adam, _, _ = train(full, "adam", 6)
    newton, _, _ = train(full, "newton", 100)
    assert losses(chained)[:6] == losses(adam)
    assert trainer.stopped
    assert chained[-1].loss == pytest.approx(newton[-1].loss, rel=1e-7)


def test_chain_goes_on_when_a_stage_stops(full: Problem) -> None:
    chained, trainer, _ = train(full, "newton:steps=100+sgd", 40)
    assert len(chained) == 40
    assert trainer.stopped is None


def test_chain_describes_its_stages() -> None:
    [chain] = specs.parse_all(["adam:lr=1e+0,steps=300 + lbfgs:history_size=5"], {})
    assert chain.name == "descend.first_order.adam.Adam, then descend.second_order.lbfgs.LBFGS"
    assert chain.lr == 1.0
    assert chain.options["1.lr"] == 1.0
    assert chain.options["2.history_size"] == 5
    assert chain.with_lr(2.0).lr == 2.0


def test_solvers_have_names_and_no_rate() -> None:
    for text, name in {
        "minimize.l-bfgs:tol=1e-3": "descend.minimize: l-bfgs",
        "scipy.newton-cg": "scipy.optimize.minimize: newton-cg",
        "sklearn.newton-cholesky": "sklearn.linear_model.LogisticRegression: newton-cholesky",
        "torch.lbfgs": "torch.optim.lbfgs.LBFGS",
    }.items():
        [spec] = specs.parse_all([text], regression.TASK.lr)
        assert (spec.name, spec.lr, spec.text) == (name, None, text)
        with pytest.raises(UsageError, match="no learning rate"):
            spec.with_lr(1.0)


REFUSED = {
    "adam+lbfgs": ["adam", "after how many steps", "adam:steps=300+lbfgs"],
    "adam:steps=0+lbfgs": ["after how many steps"],
    "adam:steps=3,stepz=3+lbfgs": ["'stepz'"],
    "adam:steps=3+lbfg": ["'lbfg'", "did you mean lbfgs"],
    "adam:steps=3,dtype=float32+lbfgs": ["dtype is for an optimizer alone"],
    "lbfgs:dtype=float32": ["'dtype'"],
    "minimize.bfg": ["did you mean minimize.bfgs"],
    "lbfgs:max_norm=1": ["'max_norm'"],
    "lbfgs:history_size=0": ["lbfgs:history_size=0", "history_size must be"],
    "minimize.l-bfgs:max_iter=-1": ["max_iter must be"],
    "minimize.newton:history_size=3": ["history_size is for method='l-bfgs'"],
    "scipy.l-bfgs-b:maxcorr=3": ["Unknown solver options: maxcorr"],
    "sklearn.lbfgs:penalties=1": ["penalties"],
    "sklearn.lbfgs:C=3": ["C"],
}


@pytest.mark.parametrize("text", REFUSED)
def test_bad_spec_says_what_is_wrong(text: str, full: Problem) -> None:
    with pytest.raises(UsageError) as caught:
        train(full, text, 1)
    for part in REFUSED[text]:
        assert part in str(caught.value)


@pytest.mark.parametrize("text", ["minimize.l-bfgs", "scipy.cg", "sklearn.lbfgs", "adam:steps=3+minimize.newton-cg"])
def test_solver_on_batches_says_why_not(text: str) -> None:
    with pytest.raises(UsageError, match="needs the same data in each step, but digits trains on batches of 64"):
        train(problem_of(digits.TASK), text, 1)


def test_scikit_learn_on_another_task_says_why_not(full: Problem) -> None:
    other = dataclasses.replace(full, task=dataclasses.replace(full.task, name="other"))
    with pytest.raises(UsageError, match="is the task regression alone"):
        train(other, "sklearn.lbfgs", 1)


def test_every_class_has_a_rate() -> None:
    found = rates(sgd=1.0, adam=0.1, lion=7.0)
    families = {name.removeprefix("torch.") for name in specs.classes()}
    assert families <= found.keys()
    assert {*LIKE_ADAM, *LIKE_SGD} <= found.keys()
    assert (found["asgd"], found["adamw"], found["adamax"], found["lion"]) == (1.0, 0.1, 0.2, 7.0)


def test_muon_leaves_other_parameters_to_adamw() -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 3))
    [spec] = specs.parse_all(["torch.muon"], rates(sgd=1.0, adam=2e-3))
    assert isinstance(spec, specs.Spec)
    muon, adamw = spec.build_for(model)
    assert [type(optimizer).__name__ for optimizer in (muon, adamw)] == ["Muon", "AdamW"]
    assert [param.shape for param in muon.param_groups[0]["params"]] == [(3, 4)]
    assert [param.shape for param in adamw.param_groups[0]["params"]] == [(9, 4), (3,)]
    assert (muon.param_groups[0]["lr"], adamw.param_groups[0]["lr"]) == (0.02, pytest.approx(2e-3))


@pytest.mark.parametrize(("given", "lr"), [("muon", 2e-3), ("muon:adamw={'lr':0.5,'eps':1e-6}", 0.5)])
def test_our_muon_has_adamw_inside(given: str, lr: float) -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 3))
    [spec] = specs.parse_all([given], rates(sgd=1.0, adam=2e-3))
    assert isinstance(spec, specs.Spec)
    [muon] = spec.build_for(model)
    matrices, others = muon.param_groups[:2]
    assert (matrices["param_names"], others["param_names"]) == (["1.weight"], ["0.weight", "2.weight"])
    assert (matrices["lr"], others["method"], others["lr"]) == (0.02, "adamw", pytest.approx(lr))


def test_averages_are_judged(full: Problem) -> None:
    [spec] = specs.parse_all(["sgd:lr=1.0,ema=0.5"], {})
    model = copy.deepcopy(full.model)
    trainer = spec.trainer(model, full)
    before = [param.detach().clone() for param in model.parameters()]
    trainer.step(full.data.sample(0, torch.Generator().manual_seed(0)))
    after = [param.detach().clone() for param in model.parameters()]
    with trainer.evaluating():
        for old, new, judged in zip(before, after, model.parameters(), strict=True):
            torch.testing.assert_close(judged.detach(), (old + new) / 2)
    for new, param in zip(after, model.parameters(), strict=True):
        assert torch.equal(new, param.detach())
