"""Tests of evaluate.py: python -m pytest tests/test_evaluate.py (seconds on a CPU, no network).

A random base with a byte-level tokenizer, a path on it, and a handful of questions in files made here.
"""

import json
import sys

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from experiments import evaluate
from experiments.results import interval
from l2d import L2D, L2DConfig
from support.tiny import TEMPLATE

torch.set_num_threads(1)                                 # for models this small, threads only wait for each other

SPECIAL = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"]
CHOICES = """{task: letters, dataset_path: json, dataset_kwargs: {data_files: {test: %s}}, test_split: test,
              fewshot_split: test, output_type: multiple_choice, doc_to_text: "{{question}}", doc_to_choice: [A, B, C],
              doc_to_target: 1}"""


@pytest.fixture
def lm_eval():
    return pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with base/, model/ (the path), rows.jsonl and letters.yaml."""
    folder = tmp_path_factory.mktemp("harness")
    vocab = {token: i for i, token in enumerate(SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=SPECIAL[0], eos_token=SPECIAL[1],
                                        additional_special_tokens=SPECIAL[2:], chat_template=TEMPLATE)
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                        num_attention_heads=4, max_position_embeddings=1024, initializer_range=0.5,
                                        eos_token_id=1, pad_token_id=0, bos_token_id=None))
    base.generation_config.do_sample, base.generation_config.temperature, base.generation_config.top_p = True, 0.6, 0.9
    base.save_pretrained(folder / "base")
    model = L2D(L2DConfig(str(folder / "base"), dim=16, cond_dim=16, sigma=4.0, lora_rank=4, lora_alpha=4.0), base)
    for p in model.path.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    model.save_pretrained(folder / "model")
    for name in ("base", "model"):
        tokenizer.save_pretrained(folder / name)
    rows = [{"question": f"What is {k} plus {k}?", "answer": f"Twice {k}.\n#### {2 * k}"} for k in range(1, 7)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "letters.yaml").write_text(CHOICES % (folder / "rows.jsonl"), encoding="utf-8")
    return folder


@pytest.fixture
def spy(lm_eval, monkeypatch):
    """Every request that reaches the model, with its answer: [(T, its arguments, the answer)]."""
    seen, HFLM = [], evaluate.import_harness().models.huggingface.HFLM
    for method in ("generate_until", "loglikelihood"):
        def call(lm, requests, do=getattr(HFLM, method)):
            answers = do(lm, requests)
            seen.extend((getattr(lm.model.config, "steps", 1), request.args, answer) for request, answer in zip(requests, answers))
            return answers
        monkeypatch.setattr(HFLM, method, call)
    return seen


def run(folder, task="rows.jsonl", model="model", **options):
    options = dict(steps=[1, 3], shots=2, max_new_tokens=12, batch_size=4) | options
    return evaluate.run([folder / model], [str(folder / task)], **options)


def answers(seen, T, greedy):
    """What the model wrote greedily at T; if not `greedy`, the log-likelihoods that it gave."""
    wrote = [(args[1], answer) for steps, args, answer in seen if steps == T and isinstance(args[1], dict)]
    rated = [answer[0] for steps, args, answer in seen if steps == T and not isinstance(args[1], dict)]
    return [answer for how, answer in wrote if not how["do_sample"]] if greedy else rated


def test_at_T1_the_harness_sees_the_base(folder, spy, capsys):
    """What is written greedily, and all likelihoods, are the bare base's own at T = 1, and others at T = 3. The base
    alone has no T, whatever is asked for, and is measured once in each way."""
    run(folder)
    run(folder, "letters.yaml")
    ours = list(spy)
    spy.clear()
    capsys.readouterr()
    lines = run(folder, model="base") + run(folder, "letters.yaml", model="base")
    assert [(line["steps"], line["decoding"]) for line in lines] == [
        (None, "sampled"), (None, "greedy"), (None, "likelihood")]
    assert "rows.jsonl, base, greedy: " in capsys.readouterr().out
    texts, likelihoods = answers(spy, 1, greedy=True), answers(spy, 1, greedy=False)
    assert len(texts) == 6 and len(set(texts)) > 1 and len(likelihoods) == 18 and len(set(likelihoods)) == 18
    assert answers(ours, 1, greedy=True) == texts
    assert answers(ours, 1, greedy=False) == pytest.approx(likelihoods, abs=1e-3)
    assert len(answers(ours, 3, greedy=True)) == 6 and answers(ours, 3, greedy=True) != texts
    assert answers(ours, 3, greedy=False) != pytest.approx(likelihoods, abs=1e-1)


def test_one_evaluation_on_noise(folder, spy, capsys):
    """T = 1 from a later start is not the base; the result says so."""
    run(folder, steps=[1])
    base = answers(spy, 1, greedy=True)
    spy.clear()
    line = run(folder, steps=[1], t_start=0.3)[-1]
    assert len(base) == 6 and answers(spy, 1, greedy=True) != base
    assert line["name"].endswith("rows.jsonl, T = 1, t_start=0.3, greedy") and line["name"] in capsys.readouterr().out
    assert line["how"] == {"solver": "midpoint", "t_start": 0.3} and line["dtype"] == "float32"
    assert run(folder, steps=[1], t_start=0.3, limit=1, dtype="bfloat16")[-1]["dtype"] == "bfloat16"


def test_seed_decides_what_is_sampled(folder, spy):
    for seed in (0, 0, 1):
        run(folder, steps=[3], seed=seed)
    first, again, other = [[answer for _, args, answer in spy[i:i + 12] if args[1]["do_sample"]] for i in (0, 12, 24)]
    assert len(set(first)) == 6 and first == again != other


def test_sampling_is_untempered(folder, lm_eval, monkeypatch):
    """Temperature and top_p of the base's generation_config do not reach `generate`."""
    seen, generate = [], L2D.generate
    def spied(model, **kwargs):
        seen.append((kwargs, model.generation_config))
        return generate(model, **kwargs)
    monkeypatch.setattr(L2D, "generate", spied)
    run(folder, steps=[1], limit=1)
    (sampled, config), (greedy, _) = seen
    assert {key: sampled[key] for key in evaluate.DECODING["sampled"]} == evaluate.DECODING["sampled"]
    assert not greedy["do_sample"] and "temperature" not in greedy and "top_p" not in greedy
    assert config.temperature in (None, 1.0) and config.top_p in (None, 1.0) and config.eos_token_id == 1


def test_results(folder, lm_eval, monkeypatch, capsys):
    """evaluate.py --tasks on a model that knows half of the answers: its score and interval, its prompts, the record."""
    prompts = []
    def generate_until(lm, requests):
        asked = [int(request.args[0].split(" plus ")[-1].split("?")[0]) for request in requests]
        prompts.extend(zip(asked, (request.args[0] for request in requests)))
        return [f"So it is\n#### {2 * k}" if k % 2 else "#### 1" for k in asked]
    monkeypatch.setattr(evaluate.import_harness().models.huggingface.HFLM, "generate_until", generate_until)
    command = f"evaluate.py --tasks {folder}/rows.jsonl --out {folder}/model --steps 1 3 --shots 2 --max-new-tokens 9 --seed 5"
    monkeypatch.setattr(sys, "argv", command.split())
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "experiments.evaluate", *command.split()[1:]])
    (folder / "model" / "benchmarks.jsonl").unlink(missing_ok=True)
    evaluate.main()
    assert [asked for asked, _ in prompts] == [1, 2, 3, 4, 5, 6] * 4 and prompts[:6] == prompts[6:12] == prompts[18:]
    for asked, prompt in prompts:
        turns = prompt.split("<|user|>")[1:]
        assert len(turns) == 3 and all("<|end|><|assistant|>Twice" in turn for turn in turns[:2])
        assert turns[2] == f"Question: What is {asked} plus {asked}?\nAnswer:<|end|><|assistant|>"
        assert not any(f"What is {asked} plus" in turn for turn in turns[:2])
    lines = [json.loads(line) for line in (folder / "model" / "benchmarks.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(line["steps"], line["decoding"]) for line in lines] == [(T, how) for T in (1, 3) for how in ("sampled", "greedy")]
    for line in lines:
        assert line["metrics"]["exact_match,strict-match"] == {"value": 0.5, "interval": list(interval(3, 6))}
        assert (line["n"], line["shots"], line["seed"], line["cut_prompts"]) == (6, 2, 5, 0)
        assert line["command"] == "python -m experiments." + command.replace("evaluate.py", "evaluate") and line["generation"]["max_gen_toks"] == 9
        assert line["versions"]["lm_eval"] == lm_eval.__version__ and line["versions"]["torch"] == torch.__version__
        assert line["chat_template"] == TEMPLATE
    printed = capsys.readouterr().out
    assert printed.count(lines[0]["command"]) == 4 and "T = 3, greedy: exact_match,strict-match 50.0% (18.8%, 81.2%)" in printed


@pytest.mark.parametrize("task, options, message", [
    ("bad.jsonl", {}, "bad.jsonl: row 2 is not"), ("rows.jsonl", {"shots": 6}, "6 shots need 7 rows, and rows has 6"),
    ("rows.jsonl", {"steps": [4]}, "the nearest are 3 and 5"), ("humaneval", {}, "--run-generated-code"),
    ("rows.jsonl", {"max_new_tokens": 1024}, "1024 new tokens do not fit into 1024 positions"),
    ("none.jsonl", {}, "No such file")])
def test_errors(folder, lm_eval, task, options, message):
    (folder / "bad.jsonl").write_text('{"question": "1", "answer": "#### 1"}\n{"question": "2", "answer": "2"}\n')
    with pytest.raises((ValueError, OSError), match=message):
        run(folder, task, **options)


def test_evaluate_is_the_package(lm_eval):
    """`import evaluate` in a task of the harness is the package, not experiments/evaluate.py."""
    evaluate.import_harness()
    assert hasattr(sys.modules["evaluate"], "load") and sys.modules["evaluate"] is not evaluate
