"""Models of latent attention show no queries: the laboratory opens, and states what it cannot show."""

import pytest

import veloxlab as vl
from tests.tiny_models import tiny
from veloxlab.errors import InputError
from veloxlab.widgets.pages.cache import NO_QUERIES


class Letters:
    """A tokenizer with one token for each letter."""

    def encode(self, text: str) -> list[int]:
        """Return numbers that differ from position to position."""
        return [(7 * i * i + 3 * i) % 90 for i in range(len(text))]


@pytest.fixture(scope="module")
def lab():
    lab = vl.Lab(tiny("deepseek_v3"), Letters(), tokens=64, window=8)
    assert lab.wait(120)
    yield lab
    lab.worker.close()


def test_the_laboratory_opens_with_errors_of_keys_and_values(lab):
    assert (lab.metric, lab.worker.last_error) == ("rel_mse", None)
    assert set(lab.errors.frame["tensor"]) == {"keys", "values"}
    assert lab.errors.frame["rel_mse"].is_finite().all()
    assert NO_QUERIES in lab.pages["cache"]._banner.value
    lab.key_bits = 2
    assert lab.wait(120)
    assert NO_QUERIES in lab.pages["cache"]._banner.value  # also after the new settings are measured


def test_errors_of_attention_are_refused(lab):
    for metric in ("output_error", "logit_error"):
        with pytest.raises(
            InputError, match=f"There is no metric {metric} here. This model computes attention by itself"
        ):
            lab.metric = metric
    assert lab.metric == "rel_mse"
    with pytest.raises(InputError, match="There is no metric output_error here"):
        lab.restore({**lab.state, "metric": "output_error"})


def test_its_page_of_errors_states_that_there_are_no_attention_maps(lab):
    page = lab.turn_to("errors")
    assert "attention" not in page.charts
    assert "there are no attention maps" in page._banner.value
