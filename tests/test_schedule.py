import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_sparse.schedule import check, number, span

totals = st.integers(1, 1000)


@settings(deadline=None)
@given(st.integers(0, 1200), totals)
def test_a_count_is_the_first_so_many(count, total):
    expected = set(range(min(count, total)))
    assert span(count, total) == span(str(count), total) == expected


@settings(deadline=None)
@given(st.fractions(0, 1, max_denominator=1000), totals)
def test_a_share_is_rounded_up(share, total):
    expected = set(range(math.ceil(share * total)))
    assert span(float(share), total) == span(str(float(share)), total) == expected


@pytest.mark.parametrize(("share", "total", "count"), [(0.07, 100, 7), (0.15, 20, 3), (0.56, 25, 14), (0.151, 20, 4)])
def test_a_float_product_adds_no_step(share, total, count):
    assert span(share, total) == set(range(count))


@settings(deadline=None)
@given(totals, st.data())
def test_ranges_name_both_ends(total, data):
    inside = st.integers(0, total - 1)
    pairs = data.draw(st.lists(st.tuples(inside, inside).map(sorted), min_size=1, max_size=4))
    spec = ",".join(f"{low}-{high}" for low, high in pairs)
    assert span(spec, total) == {i for low, high in pairs for i in range(low, high + 1)}


@settings(deadline=None)
@given(totals, st.data())
def test_indices_count_from_the_end_if_negative(total, data):
    back = data.draw(st.integers(1, total))
    assert span(f"-{back}", total) == {total - back}
    assert span(f"0, -{back}", total) == {0, total - back}


def test_a_count_and_a_share_of_equal_value_differ():
    assert span(1, 20) == {0}
    assert span(1.0, 20) == set(range(20))
    with pytest.raises(ValueError, match="True"):
        span(True, 20)


@pytest.mark.parametrize(
    ("spec", "total", "message"),
    [
        (-1, 20, "-1 names no steps or layers"),
        (math.nan, 20, "nan names no"),
        (math.inf, 20, "inf names no"),
        (1.5, 20, "between 0 and 1, not 1.5"),
        ("1.5", 20, "between 0 and 1, not 1.5"),
        ("", 20, "'' names no"),
        ("ten", 20, "'ten' names no"),
        ("0-1,", 20, "'' is not an index or a range in '0-1,'"),
        ("-", 20, "'-' is not an index"),
        ("1-2-3", 20, "'1-2-3' is not"),
        ("0.5-1", 20, "'0.5-1' is not"),
        ("5-3", 20, "'5-3' in '5-3' runs backwards"),
        ("0-20", 20, "'0-20' in '0-20' lies outside 0..19"),
        ("3,20", 20, "'20' in '3,20' lies outside 0..19"),
        ("-21", 20, "'-21' in '-21' lies outside 0..19"),
    ],
)
def test_a_spec_that_names_nothing_raises(spec, total, message):
    with pytest.raises(ValueError, match=message):
        span(spec, total)


@pytest.mark.parametrize("spec", [-1, 1.5, math.nan, "", "ten", "5-3", "0-1,x", True, None, [0, 1], {"0": 1}])
def test_check_refuses_what_no_total_could_explain(spec):
    with pytest.raises(ValueError):
        check(spec)


@pytest.mark.parametrize("spec", [0, 7, 10**6, 0.0, 0.15, 1.0, "3", "0.2", "0-1,39", "-1", "0-999999999"])
def test_check_accepts_what_some_total_could_explain(spec):
    check(spec)


def test_numbers_keep_their_type():
    assert (number("3"), type(number("3"))) == (3, int)
    assert (number("1.0"), type(number("1.0"))) == (1.0, float)
