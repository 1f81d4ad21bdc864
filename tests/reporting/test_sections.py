"""The pictures of the report: what they are drawn from."""

import numpy as np
from evaluation.small import BACKEND, make_encoder

from fedssl.data.image_set import Images
from fedssl.evaluation.features import extract_features
from fedssl.reporting import figures
from fedssl.reporting.sections import Encoders, RunImages, encode_some, picture_sites
from fedssl.runs.directory import RunDirectory
from fedssl.runs.metrics import ClientMetrics, RoundMetrics


class Bare:
    """An image set without test images."""

    def __init__(self, images):
        self.train, self.test = Images(images.pixels, None), None


def test_some_test_images_are_encoded_before_and_after_training(digits):
    encoders = Encoders(make_encoder(0), make_encoder(1), 3, 8, 16, BACKEND)
    encoded = encode_some(RunImages(digits, [], encoders), 40, seed=0)
    assert (encoded.kind, encoded.round, len(encoded.labels)) == ("test", 3, 40)
    for features, encoder in ((encoded.before, make_encoder(0)), (encoded.after, make_encoder(1))):
        expected = extract_features(encoder, encoded.pixels, BACKEND, 256, 8)
        np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5)
    again = encode_some(RunImages(digits, [], encoders), 40, seed=0)
    other = encode_some(RunImages(digits, [], encoders), 40, seed=1)
    assert np.array_equal(encoded.pixels, again.pixels)
    assert not np.array_equal(encoded.pixels, other.pixels)


def test_training_images_stand_in_where_there_are_no_others(digits):
    encoders = Encoders(make_encoder(0), make_encoder(1), 3, 8, 16, BACKEND)
    encoded = encode_some(RunImages(Bare(digits.train), [], encoders), 5, seed=0)
    assert (encoded.kind, encoded.labels, len(encoded.pixels)) == ("training", None, 5)


def test_the_loss_graph_counts_the_clients_of_all_rounds(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, file: drawn.append(figure))
    rounds = [
        RoundMetrics(round=number, train_loss=1.0, clients=(ClientMetrics(a), ClientMetrics(b)))
        for number, (a, b) in enumerate(((0, 1), (1, 2), (0, 2)), start=1)
    ]
    figures.draw_loss_graph(rounds, tmp_path / "loss.png", "SimCLR on digits")
    assert drawn[0].axes[0].get_title(loc="left") == "SimCLR on digits, 3 clients"


def test_the_loss_graph_joins_the_rounds_that_were_evaluated(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, file: drawn.append(figure))
    rounds = [
        RoundMetrics(
            round=number,
            train_loss=2.0,
            eval_loss=loss,
            clients=(ClientMetrics(0, train_loss=2.0, eval_loss=loss),),
        )
        for number, loss in enumerate((None, 3.0, None, 1.0), start=1)
    ]
    figures.draw_loss_graph(rounds, tmp_path / "loss.png", "SimCLR on digits")
    train, evaluation = drawn[0].axes[0].lines
    assert list(train.get_xdata()) == [1, 2, 3, 4]
    assert list(zip(*evaluation.get_data(), strict=True)) == [(2, 3.0), (4, 1.0)]


def test_the_last_evaluation_at_the_sites_is_drawn(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, file: drawn.append(figure))
    run = RunDirectory(tmp_path)
    assert picture_sites(run, tmp_path / "sites.png") == []
    told = {"confusion": [[3, 1], [0, 4]], "by_site": {str(site): 0.5 for site in range(25)}}
    for method in ("head from sums", "head by rounds"):
        row = {"encoder": "federated SimCLR", "method": method, "sites": [told]}
        run.add_result({"rows": [row]})
    run.add_result({"rows": [{"encoder": "random encoder", "method": "kNN"}]})
    (picture,) = picture_sites(run, tmp_path / "sites.png")
    assert "25 sites" in picture.caption
    assert "(5 more are left out)" in picture.caption
    matrix, bars = drawn[0].axes[:2]
    assert matrix.images[0].get_array().tolist() == [[0.75, 0.25], [0, 1]]
    assert [label.get_text() for label in matrix.get_yticklabels()] == ["0", "1"]
    assert len(bars.patches) == 20
