"""The two changes of the training that are not in the paper (experiments/variants.py)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache

import l2d
from experiments import variants
from support import tiny
from test_l2d import IDS, table, tiny_base, tiny_l2d

ROOT = Path(__file__).parents[1]

@pytest.mark.parametrize("cond_dim", [16, 48, 8])
@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_a_tied_start_scores_tokens_as_bayes_does(tied, cond_dim):
    """Token j's logit of f alone is x_1(j)·x_t, as far as any f = M x_t can have the head give it:
    for a tied head all but entirely. With C < d, f sees a projection of x_t. T = 1 stays the base's."""
    base = tiny_base(tie_word_embeddings=tied)
    model = tiny_l2d(base=base, perturb=False, cond_dim=cond_dim)
    variants.start_tied(model)
    embed, x = model.path.x_embedder, torch.randn(500, 16)
    first = embed[0].weight / 0.3
    seen = x @ first.T @ first
    assert torch.allclose(seen, x, atol=1e-5) == (cond_dim >= 16)
    x_1, head = table(model), base.lm_head.weight
    best = seen @ torch.linalg.lstsq(head, x_1).solution.T @ head.T
    logits = embed(0.1 * x) @ head.T                            # small x: SiLU is x/2
    assert torch.corrcoef(torch.stack([logits.flatten(), best.flatten()]))[0, 1] > 0.98
    bayes = seen @ x_1.T
    if tied:                                                    # then the head has room for all
        assert torch.corrcoef(torch.stack([logits.flatten(), bayes.flatten()]))[0, 1] > 0.95
        assert (logits.argmax(-1) == bayes.argmax(-1)).float().mean() > 0.7
    hidden = model.run_base(IDS, None, None, DynamicCache())
    size = hidden.pow(2).mean().sqrt() * min(1, cond_dim / 16) ** 0.5
    assert embed(x).pow(2).mean().sqrt().item() == pytest.approx(size.item(), rel=0.3)
    assert torch.equal(model(IDS, steps=1).logits, base(IDS).logits)

@pytest.mark.parametrize("share, own", [(0.5, False), (1.0, False), (1.0, True)])
def test_a_share_of_the_states_holds_a_token_that_is_drawn(share, own):
    """By the base, or by the path from noise alone. The loss stays that of the right tokens."""
    model, seeds = tiny_l2d(class_names=()), torch.arange(200)
    ids = torch.arange(200)[:, None] % 97 + torch.zeros(1, 6, dtype=torch.long)
    context, targets = model.read_labelled(ids, ids, seeds=seeds)
    logits = model.base(ids).logits[:, :-1]
    t = l2d.uniform(1, context.seeds, context.positions, l2d.TIME)
    if own:
        logits = model.path((1 - t) * l2d.initial_noise(model.config, context), t, context)
    drawn = variants.propose(model.path, context, targets, share, own)
    proposed = drawn != targets
    rate = share * (1 - logits.softmax(-1).gather(-1, targets[..., None])).mean().item()
    assert proposed.float().mean().item() == pytest.approx(rate, abs=0.05)
    losses = logits.log_softmax(-1).gather(-1, drawn[..., None])[..., 0][proposed]
    entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean().item()
    assert -losses.mean().item() == pytest.approx(entropy, rel=0.1)      # as the base draws
    found = l2d.diffusion_losses(model.path, context, targets, drawn)
    x_1 = model.path.vocabulary(model.base.get_input_embeddings()(drawn))
    x_t = (1 - t) * l2d.initial_noise(model.config, context) + t * x_1
    logits = model.path(x_t, t, context)
    right = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)
    loss = variants.loss_with_proposals(model, share, own, ids, len(right), input_ids=ids, seeds=seeds)
    assert loss.loss.item() == pytest.approx(right.mean().item(), rel=1e-4)

def test_both_train_as_train_py_does_and_continue(tmp_path):
    """Without either, the log is that of train.py; a resumed run keeps its options."""
    def run(script, *words):
        done = subprocess.run([sys.executable, *script, "--model", "base", "--data", "data.jsonl",
                               "--batch-size", "4", "--max-steps", "4", "--validation", "2",
                               "--sigma", "3", "--dim", "8", "--cond-dim", "8", "--lora-rank", "2",
                               "--save-every", "2", "--device", "cpu", *words],
                              cwd=tmp_path, capture_output=True, text=True,
                              env=os.environ | {"PYTHONPATH": str(ROOT)})
        assert done.returncode == 0, done.stderr
    tokenizer = tiny.make_tokenizer()
    tiny.save(tmp_path / "base", tiny.make_model(tokenizer, hidden=32, layers=2), tokenizer)
    rows = tiny.questions(40, seed=0)
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def losses(out):
        lines = (tmp_path / out / "log.jsonl").read_text().splitlines()
        return [line["loss"] for line in map(json.loads, lines) if "loss" in line]
    variant = ["-m", "experiments.variants"]
    run([ROOT / "train.py"], "--out", "plain")
    run(variant, "--out", "same")
    run(variant, "--out", "tied", "--init", "tied")
    run(variant, "--out", "proposals", "--proposals", "1")
    assert losses("plain") == losses("same")
    assert losses("tied")[0] == losses("proposals")[0] == losses("plain")[0]     # w(t) is still 0
    outs = ("plain", "same", "tied", "proposals")
    paths = {(tmp_path / out / "model.safetensors").read_bytes() for out in outs}
    assert len(paths) == 3
    model = l2d.L2D.from_pretrained(tmp_path / "proposals")
    assert model.forward.__func__ is l2d.L2D.forward     # nothing of the training is left
