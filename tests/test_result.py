"""What a run returns: asked for outputs and scores, printed, shown, read from its folder again."""

import html.parser
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import twophase_ext as tp
from helpers import quiet, toy_convnet, toy_data, toy_images, toy_mlp


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    x, y = toy_data()
    folder = tmp_path_factory.mktemp("runs") / "gd"
    trainer = quiet(toy_mlp(), folder=folder, epochs=6, verify="auto", second_phase="gd")
    return trainer.fit((x, y), (x[:20], y[:20])), x, y


def test_predict_is_the_network_in_evaluation_mode(run):
    result, x, _ = run
    with torch.no_grad():
        assert torch.equal(result.predict(x), result.model(x))
    assert torch.equal(result.predict(x.double().numpy()), result.predict(x))
    assert not result.predict(x).requires_grad
    with pytest.raises(ValueError, match=r"does not run on inputs \[60, 4\]"):
        result.predict(x[:, :4])


def test_predict_leaves_modes_and_scales_images():
    images, y = toy_images()
    result = quiet(toy_convnet(), second_phase="none").fit((images, y))
    result.model.head.eval()
    modes = [module.training for module in result.model.modules()]
    assert any(modes) and not all(modes)
    pixels = (images * 255).to(torch.uint8)
    with torch.no_grad():
        assert torch.equal(result.predict(pixels), result.predict(pixels.float().div(255)))
    assert [module.training for module in result.model.modules()] == modes
    many = images.repeat(9, 1, 1, 1)  # more than one batch
    found = result.predict(many)
    assert len(found) == 297 and torch.allclose(found[:33], found[-33:], atol=1e-6)
    with pytest.raises(ValueError, match="NaN"):
        result.predict(images * float("nan"))
    with pytest.raises(ValueError, match="empty"):
        result.predict(images[:0])


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = toy_mlp()

    def forward(self, a, b):
        return self.net(torch.cat([a, b], 1))


def test_several_inputs_are_predicted_as_they_are_trained():
    x, y = toy_data()
    parts = {"a": x[:, :2], "b": x[:, 2:]}
    result = quiet(Two()).fit((parts, y))
    with torch.no_grad():
        assert torch.equal(result.predict(parts), result.model.net(x))
    assert result.score((parts, y))["loss"] == pytest.approx(result.final["train_loss"], rel=1e-6)


def test_score_is_what_the_run_measured(run):
    result, x, y = run
    truth = nn.functional.cross_entropy(result.predict(x).double(), y)
    found = result.score((x, y))
    assert found["loss"] == pytest.approx(float(truth), rel=1e-6)
    assert found["accuracy"] == float((result.predict(x).argmax(1) == y).double().mean())
    assert found == {k: result.final[f"train_{k}"] for k in ("loss", "accuracy")}
    loader = DataLoader(TensorDataset(x[:20], y[:20]), batch_size=7)
    assert result.score(loader) == {k: result.final[f"val_{k}"] for k in ("loss", "accuracy")}
    with pytest.raises(ValueError, match=r"data: expected as many targets as inputs"):
        result.score((x, y[:3]))


def test_score_of_other_losses_has_no_accuracy():
    x, _ = toy_data()
    mean = tp.ConvexLoss(lambda q, y: nn.functional.huber_loss(q, y), 1.0, "huber")
    result = quiet(toy_mlp(classes=1), loss=mean).fit((x, x[:, :1]))
    truth = nn.functional.huber_loss(result.predict(x), x[:, :1])
    assert result.score((x, x[:, :1])) == {"loss": pytest.approx(float(truth)), "accuracy": None}


def test_print_begins_with_the_lead(run):
    result, _, _ = run
    lines = str(result).split("\nrun completed")[0].splitlines()
    assert " ".join(lines) == result.lead and max(map(len, lines)) <= 100
    assert result.lead.startswith("The training loss is ")
    assert "Completed: 3 epochs on all layers, then 3 on the last layer" in result.lead
    assert "proved at these weights" in result.lead and "after 3 steps." in result.lead


def test_the_lead_claims_no_bound_that_is_not_established(run):
    result, _, _ = run
    copy = pickle.loads(pickle.dumps(result))
    assert copy.lead == result.lead
    copy.guarantee.premises[0] = ("analytic modules", "failed", "ReLU")
    assert copy.lead.endswith("but no guarantee: analytic modules failed.")
    copy.guarantee.rigorous = False
    assert copy.lead.endswith("a constant was measured, not proved.")
    copy.guarantee.refuted = "the loss is above"
    assert copy.lead.endswith("is REFUTED by a measured loss.")
    x, y = toy_data()
    plain = quiet(toy_mlp(), second_phase="none").fit((x, y))
    assert "no second phase." in plain.lead and plain.lead.endswith("global: not verified.")


class Balanced(html.parser.HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.text = [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_notebooks_show_the_lead_and_fold_the_rest(run):
    result, x, _ = run
    shown = result._repr_html_()
    assert shown.startswith(f"<p>{result.lead}</p><details>")
    assert str(result).split("\nrun completed")[1] in Balanced(shown).text
    verdict = result.verdict
    verdict.reason = "n < 3 & <b>"
    shown = verdict._repr_html_()
    assert "n &lt; 3 &amp; &lt;b&gt;" in shown and "n < 3 & <b>" in Balanced(shown).text
    verdict.reason = ""
    table = tp.check_assumptions(nn.Sequential(nn.Linear(5, 3)), x)
    text = Balanced(table._repr_html_()).text
    assert all(row.evidence in text for row in table.rows) and any(r.advice for r in table.rows)
    assert all(row.advice in text for row in table.rows if row.status == "failed")


def test_a_run_folder_gives_the_result_again(run):
    result, x, y = run
    model = toy_mlp(seed=9).train()
    again = tp.load_run(str(result.run_dir), model)
    assert again.model is model and not model.training
    assert torch.equal(again.predict(x), result.predict(x))
    assert again.score((x, y)) == result.score((x, y))
    assert str(again) == str(result)
    kept = [{k: v for k, v in row.items() if k != "objective"} for row in result.history]
    assert again.history == kept and again.final == result.final
    alone = tp.load_run(result.run_dir)
    assert alone.model is None and alone.verdict.as_dict() == result.verdict.as_dict()
    assert alone.lead == result.lead
    with pytest.raises(ValueError, match=r"model: expected one, got none: tp\.load_run"):
        alone.predict(x)


def test_weights_of_another_precision_and_another_model(tmp_path):
    x, y = toy_data()
    result = quiet(toy_mlp(), folder=tmp_path / "a", precision="float64").fit((x.double(), y))
    again = tp.load_run(tmp_path / "a", toy_mlp(seed=1))
    assert again.predict(x).dtype == torch.float64
    assert torch.equal(again.predict(x.double()), result.predict(x.double()))
    other = toy_mlp(width=81)
    before = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(ValueError, match=r"model: .*another model: 3 entries differ, first 2\.w"):
        tp.load_run(tmp_path / "a", other)
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got str"):
        tp.load_run(tmp_path / "a", "model")


def test_folders_without_a_run_without_an_end_and_damaged(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"folder: .*holds no run"):
        tp.load_run(tmp_path)
    x, _ = toy_data()
    mean = tp.ConvexLoss(lambda q, y: nn.functional.huber_loss(q, y), 1.0, "huber")
    quiet(toy_mlp(classes=1), folder=tmp_path / "a", loss=mean).fit((x, np.ones((60, 1), "f4")))
    (tmp_path / "a" / "result.json").unlink()
    found = tp.load_run(tmp_path / "a", toy_mlp(classes=1))
    assert found.status == "unfinished" and len(found.history) == 4
    with pytest.raises(ValueError, match="loss: the run's own is not known"):
        found.score((x, x[:, :1]))
    (tmp_path / "a" / "result.json").write_text(
        '{"status": "completed", "final": {"val_loss": []}}'
    )
    with pytest.raises(ValueError, match=r"folder: .*result\.json cannot be read"):
        tp.load_run(tmp_path / "a")
    (tmp_path / "a" / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"folder: .*config\.json cannot be read"):
        tp.load_run(tmp_path / "a")
