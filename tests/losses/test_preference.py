"""Every loss against numbers worked out by hand, and against TRL's on the same log-probabilities."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from lightning_qlora.losses import (
    AnswerLogProbs,
    CPOLoss,
    DPOLoss,
    HingeLoss,
    IPOLoss,
    KTOLoss,
    ORPOLoss,
    RobustDPOLoss,
    SimPOLoss,
)

# log pi, log pi_ref and |y| of two pairs: r = 2, -4 for the chosen, -3, 1 for the rejected, so h = 5 and -5.
CHOSEN = AnswerLogProbs(torch.tensor([-10.0, -24.0]), torch.tensor([-12.0, -20.0]), torch.tensor([5.0, 8.0]))
REJECTED = AnswerLogProbs(torch.tensor([-15.0, -9.0]), torch.tensor([-12.0, -10.0]), torch.tensor([3.0, 4.0]))


def log_s(t):
    return -math.log(1 + math.exp(-t))


def log_odds(mean):
    return mean - math.log(1 - math.exp(mean))


BY_HAND = {
    "dpo": (DPOLoss(0.1), -log_s(0.5) - log_s(-0.5)),
    "cdpo": (DPOLoss(0.2, 0.25), 2 * (-0.75 * log_s(1) - 0.25 * log_s(-1)) - 0.5 * (log_s(-1) - log_s(1))),
    "robust": (
        RobustDPOLoss(0.1, 0.25),
        ((-0.75 * log_s(0.5) + 0.25 * log_s(-0.5)) + (-0.75 * log_s(-0.5) + 0.25 * log_s(0.5))) / 0.5,
    ),
    # per token: 2/5 - (-3/3) = 1.4 and -4/8 - 1/4 = -0.75, against 1/(2 * 0.5) = 1
    "ipo": (IPOLoss(0.5), 0.4**2 + 1.75**2),
    "hinge": (HingeLoss(0.1), 0.5 + 1.5),
    # per token: -2 against -5, and -3 against -2.25
    "orpo": (
        ORPOLoss(0.3),
        -0.3 * (log_s(log_odds(-2) - log_odds(-5)) + log_s(log_odds(-3) - log_odds(-2.25))),
    ),
    "simpo": (SimPOLoss(2.0, 0.5), -log_s(2 * 3 - 0.5) - log_s(2 * -0.75 - 0.5)),
    "cpo": (CPOLoss(0.1), -log_s(0.5) - log_s(-1.5)),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_equals_the_equation_worked_out_by_hand(name):
    loss, expected = BY_HAND[name]
    terms = loss(CHOSEN, REJECTED)
    assert float(terms.loss_sum) == pytest.approx(expected, abs=1e-6)
    assert terms.num_terms == 2


def test_kto_equals_the_equation_worked_out_by_hand():
    loss = KTOLoss(0.5, desirable_weight=2.0, undesirable_weight=3.0)
    s = lambda t: 1 / (1 + math.exp(-t))  # noqa: E731
    terms = loss(CHOSEN, REJECTED, torch.tensor(1.0))
    # r - z = 1, -5 for the desirable; z - r = 4, 0 for the undesirable
    expected = 2 * (1 - s(0.5) + 1 - s(-2.5)) + 3 * (1 - s(2) + 1 - s(0))
    assert float(terms.loss_sum) == pytest.approx(expected, abs=1e-6)
    assert terms.num_terms == 4
    assert terms.correct.tolist() == [True, False, True, False]
    assert float(loss(CHOSEN, REJECTED, torch.tensor(-7.0)).loss_sum) == pytest.approx(
        2 * (1 - s(1) + 1 - s(-2)) + 3 * (1 - s(1.5) + 1 - s(-0.5)), abs=1e-6
    )


def test_kto_takes_one_kind_alone_and_no_gradient_through_the_divergence():
    kl, policy = torch.tensor(0.5, requires_grad=True), torch.tensor([-3.0], requires_grad=True)
    none = AnswerLogProbs(torch.empty(0), torch.empty(0), torch.empty(0))
    answer = AnswerLogProbs(policy, torch.tensor([-3.0]), torch.tensor([2.0]))
    terms = KTOLoss()(answer, none, kl)
    terms.loss_sum.backward()
    assert terms.num_terms == 1
    assert kl.grad is None
    assert policy.grad.item() < 0
    assert KTOLoss()(none, answer._replace(policy=policy.detach()), kl).num_terms == 1


def test_rewards_are_detached_and_count_the_pairs_won():
    chosen = CHOSEN._replace(policy=CHOSEN.policy.clone().requires_grad_())
    for loss, _ in BY_HAND.values():
        terms = loss(chosen, REJECTED)
        assert terms.loss_sum.requires_grad
        assert not terms.reward_chosen.requires_grad
        assert torch.equal(terms.correct, terms.reward_chosen > terms.reward_rejected)
    terms = DPOLoss(0.1)(CHOSEN, REJECTED)
    torch.testing.assert_close(terms.reward_chosen, torch.tensor([0.2, -0.4]))
    torch.testing.assert_close(terms.reward_rejected, torch.tensor([-0.3, 0.1]))
    torch.testing.assert_close(SimPOLoss(2.0)(CHOSEN, REJECTED).reward_chosen, torch.tensor([-4.0, -6.0]))


def test_gradient_of_dpo_pushes_the_answers_apart_by_beta_times_the_error():
    policy = torch.tensor([-10.0], requires_grad=True), torch.tensor([-15.0], requires_grad=True)
    sides = [
        AnswerLogProbs(p, side.reference[:1], side.num_tokens[:1])
        for p, side in zip(policy, (CHOSEN, REJECTED), strict=True)
    ]
    DPOLoss(0.1)(*sides).loss_sum.backward()
    expected = 0.1 * (1 - 1 / (1 + math.exp(-0.5)))
    assert policy[0].grad.item() == pytest.approx(-expected, abs=1e-7)
    assert policy[1].grad.item() == pytest.approx(expected, abs=1e-7)


def test_odds_of_a_certain_answer_stay_finite():
    policy = torch.tensor([0.0], requires_grad=True)
    certain = AnswerLogProbs(policy, None, torch.tensor([4.0]))
    terms = ORPOLoss()(certain, AnswerLogProbs(torch.tensor([-400.0]), None, torch.tensor([2.0])))
    terms.loss_sum.backward()
    assert torch.isfinite(terms.loss_sum)
    assert torch.isfinite(policy.grad).all()


@pytest.mark.parametrize("name", BY_HAND)
def test_no_pair_sums_to_an_exact_zero_that_reaches_the_model(name):
    policy = torch.empty(0, requires_grad=True)
    none = AnswerLogProbs(policy, torch.empty(0), torch.empty(0))
    terms = BY_HAND[name][0](none, none)
    terms.loss_sum.backward()
    assert terms.loss_sum == 0
    assert terms.num_terms == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda: DPOLoss(beta=0.0),
        lambda: DPOLoss(label_smoothing=0.5),
        lambda: ORPOLoss(likelihood_weight=-1.0),
        lambda: KTOLoss(undesirable_weight=-1.0),
    ],
)
def test_options_out_of_range_say_what_to_write(make):
    with pytest.raises(ValueError, match="write"):
        make()


# TRL


class Stub:
    """As much of a trainer as TRL's loss functions look at."""

    accelerator = SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x)
    model = SimpleNamespace(training=True)
    aux_loss_enabled = use_weighting = False
    precompute_ref_logps = calculate_KL = True
    ld_alpha, loss_weights, f_divergence_type, alpha, _tp_size, _total_train_tokens = (
        None,
        [1.0],
        "reverse_kl",
        0.0,
        1,
        0,
    )

    def __init__(self, **attributes):
        self._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
        self.__dict__.update(attributes)


class Model:
    """Answers with given log-probabilities, as TRL's fused head does."""

    def __init__(self, log_probs_BL):
        zeros = torch.zeros_like(log_probs_BL)
        self.outputs = SimpleNamespace(
            log_probs=log_probs_BL, entropy=zeros, mean_logits=zeros, is_top1=torch.zeros_like(zeros, dtype=torch.bool)
        )

    def __call__(self, **_):
        return self.outputs


def random_answers(count, seed=0):
    """Log-probabilities of the tokens of ``count`` answers after a prompt of two tokens, and TRL's completion mask."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (count,), generator=generator)
    mask_BL = ((torch.arange(10) >= 2) & (torch.arange(10) < 2 + lengths[:, None])).long()
    log_probs_BL = -3 * torch.rand(count, 9, generator=generator) * mask_BL[:, 1:]
    reference_B = log_probs_BL.sum(1) + 4 * torch.randn(count, generator=generator)
    return mask_BL, log_probs_BL, AnswerLogProbs(log_probs_BL.sum(1), reference_B, lengths.float())


def split(answers, start, end):
    return AnswerLogProbs(*(column[start:end] for column in answers))


@pytest.mark.parametrize(
    ("loss", "attributes"),
    [
        (DPOLoss(0.3), {"loss_types": ["sigmoid"], "label_smoothing": 0.0}),
        (RobustDPOLoss(0.3, 0.2), {"loss_types": ["robust"], "label_smoothing": 0.2}),
        (IPOLoss(0.3), {"loss_types": ["ipo"]}),
        (HingeLoss(0.3), {"loss_types": ["hinge"]}),
        # TRL has no smoothed sigmoid any more; AOT on a single pair is just that.
        (DPOLoss(0.3, 0.2), {"loss_types": ["aot"], "label_smoothing": 0.2}),
        (DPOLoss(0.3, rpo_alpha=0.7), {"loss_types": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7]}),
    ],
    ids=["dpo", "robust", "ipo", "hinge", "cdpo", "rpo"],
)
def test_equals_trls_dpo_trainer(loss, attributes):
    trainer = pytest.importorskip("trl").DPOTrainer
    pairs = 1 if "aot" in attributes["loss_types"] else 6
    mask_BL, log_probs_BL, answers = random_answers(2 * pairs)
    inputs = {
        "input_ids": mask_BL, "attention_mask": torch.ones_like(mask_BL), "completion_mask": mask_BL,
        "ref_chosen_logps": answers.reference[:pairs], "ref_rejected_logps": answers.reference[pairs:],
    }  # fmt: skip
    stub = Stub(beta=0.3, **attributes)
    expected = trainer._compute_loss(stub, Model(log_probs_BL), inputs, False)
    chosen, rejected = split(answers, 0, pairs), split(answers, pairs, None)
    terms = loss(chosen, rejected)
    found = terms.loss_sum / terms.num_terms - loss.nll_weight * chosen.policy.sum() / chosen.num_tokens.sum()
    assert float(found) == pytest.approx(float(expected), abs=1e-6)
    metrics = stub._metrics["train"]
    assert float(terms.reward_chosen.mean()) == pytest.approx(metrics["rewards/chosen"][0], abs=1e-6)
    assert float(terms.correct.float().mean()) == pytest.approx(metrics["rewards/accuracies"][0], abs=1e-6)


@pytest.mark.parametrize("desirable", [4, 8, 0])
def test_equals_trls_kto_trainer(desirable):
    trainer = pytest.importorskip("trl").KTOTrainer
    mask_BL, log_probs_BL, answers = random_answers(8)
    _, _, mismatched = random_answers(8, seed=1)
    inputs = {
        "input_ids": mask_BL, "attention_mask": torch.ones_like(mask_BL), "completion_mask": mask_BL,
        "label": torch.arange(8) < desirable, "ref_logps": answers.reference, "ref_KL_logps": mismatched.reference,
    }  # fmt: skip
    options = {"beta": 0.3, "desirable_weight": 1.2, "undesirable_weight": 0.8}
    stub = Stub(loss_type="kto", _compute_kl_logps=lambda *_: mismatched.policy, **options)
    expected = trainer._compute_loss(stub, Model(log_probs_BL), inputs, False)
    kl = mismatched.log_ratio.mean()
    terms = KTOLoss(**options)(split(answers, 0, desirable), split(answers, desirable, None), kl)
    assert float(terms.loss_sum / terms.num_terms) == pytest.approx(float(expected), abs=1e-6)
    assert max(0.0, float(kl)) == pytest.approx(stub._metrics["train"]["kl"][0], abs=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_orpo_equals_trls():
    trainer = pytest.importorskip("trl.experimental.orpo").ORPOTrainer
    _, _, answers = random_answers(12)
    chosen, rejected = split(answers, 0, 6), split(answers, 6, None)
    terms = ORPOLoss(0.3)(chosen, rejected)
    losses, reward_chosen, reward_rejected, *_ = trainer.odds_ratio_loss(Stub(beta=0.3), chosen.mean, rejected.mean)
    assert float(terms.loss_sum) == pytest.approx(float(-losses.sum()), abs=1e-6)
    torch.testing.assert_close(terms.reward_chosen, reward_chosen)
    torch.testing.assert_close(terms.reward_rejected, reward_rejected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("loss", "attributes", "per_token"),
    [
        (CPOLoss(0.3), {"loss_type": "sigmoid", "label_smoothing": 0.0}, False),
        (CPOLoss(0.3, 0.2), {"loss_type": "sigmoid", "label_smoothing": 0.2}, False),
        (SimPOLoss(0.3, 0.5), {"loss_type": "simpo", "label_smoothing": 0.0, "simpo_gamma": 0.5}, True),
    ],
    ids=["cpo", "smoothed", "simpo"],
)
def test_cpo_and_simpo_equal_trls(loss, attributes, per_token):
    trainer = pytest.importorskip("trl.experimental.cpo").CPOTrainer
    _, _, answers = random_answers(12)
    chosen, rejected = split(answers, 0, 6), split(answers, 6, None)
    sides = (chosen.mean, rejected.mean) if per_token else (chosen.policy, rejected.policy)
    losses, reward_chosen, _ = trainer.cpo_loss(Stub(beta=0.3, **attributes), *sides)
    terms = loss(chosen, rejected)
    assert float(terms.loss_sum) == pytest.approx(float(losses.sum()), abs=1e-6)
    torch.testing.assert_close(terms.reward_chosen, reward_chosen)
