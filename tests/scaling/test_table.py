"""Tables as people have them: read, or one clear line."""

import numpy as np
import pytest

from selfsup.scaling.cells import number
from selfsup.scaling.cost import Cost
from selfsup.scaling.table import Columns, read_table

PLAIN = Columns("N", "loss", "D")


def write(tmp_path, text, name="runs.csv"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1.5e9", 1.5e9), ("1,400,000", 1.4e6), ("125M", 1.25e8), ("1.4B", 1.4e9), ("2T", 2e12), (" 70k ", 7e4),
        ("3E+18", 3e18), ("1_000", 1000), (".5", 0.5), ("-2", -2.0), ("12%", 12.0),
    ],
)  # fmt: skip
def test_numbers(text, value):
    assert number(text) == pytest.approx(value)


@pytest.mark.parametrize(
    "text", ["", "NaN", "nan", "N/A", "-", "none", "diverged", "1.2.3", "3,10", "12,34,567"]
)
def test_what_is_no_number(text):
    assert np.isnan(number(text))


def test_infinity_stays():
    assert np.isinf(number("inf")) and np.isinf(number("-Infinity"))


def test_samples_or_flops_or_both(tmp_path):
    text = "N,D,C,loss\n" + "".join(
        f"{n},{d},{7 * n * d},3.0{i}\n" for i, (n, d) in enumerate([(1e8, 2e9), (2e8, 1e9)])
    )
    path = write(tmp_path, text)
    only_d = read_table(path, PLAIN)
    assert only_d.flops == pytest.approx(6 * only_d.params * only_d.samples) and only_d.cost == Cost(6.0)
    only_c = read_table(path, Columns("N", "loss", flops="C"))
    assert only_c.samples == pytest.approx([7 / 6 * 2e9, 7 / 6 * 1e9])
    both = read_table(path, Columns("N", "loss", "D", "C"))
    assert (
        both.samples == pytest.approx([2e9, 1e9])
        and both.cost.base == pytest.approx(7)
        and both.measured_flops
    )
    assert read_table(path, Columns("N", "loss", "D", "C"), flops_per=7.0).cost.base == pytest.approx(7)
    with pytest.raises(ValueError, match=r"--flops-per 6: the table's own C / \(N D\) is 7"):
        read_table(path, Columns("N", "loss", "D", "C"), flops_per=6.0)
    assert read_table(path, PLAIN, flops_per=4.0).flops == pytest.approx([4 * 2e17] * 2)


def test_what_is_dropped_is_counted(tmp_path):
    rows = [
        "a,100M,2B,3.10", "b,200M,2B,nan", "c,200M,,3.0", "d,,2B,3.0", "e,400M,4B,inf", "f,400M,4B,0", "g,800M,-1,3.0",
        "h,1.6B,8B,", "i,100M,4B,3.05", "i,100M,4B,3.05",
    ]  # fmt: skip
    runs = read_table(write(tmp_path, "name,N,D,loss\n" + "\n".join(rows) + "\n"), PLAIN)
    assert runs.params.tolist() == [1e8, 1e8] and runs.line.tolist() == [2, 10] and runs.read == 10
    assert sum(runs.dropped.values()) == 8
    assert runs.dropped["exact copies of another row"] == 1
    assert runs.dropped["loss missing or NaN (diverged, or not finished)"] == 2
    assert runs.dropped["loss infinite (diverged)"] == 1 and runs.dropped["loss zero or negative"] == 1
    assert runs.dropped["D zero or negative"] == 1 and runs.dropped["D missing or no number"] == 1


def test_separators_and_byte_order_mark(tmp_path):
    for mark, name in ((",", "a.csv"), ("\t", "a.tsv"), (";", "b.csv")):
        lines = [
            mark.join(cells) for cells in (["N", "D", "loss"], ["1e8", "2e9", "3.1"], ["2e8", "1e9", "3.0"])
        ]
        path = write(tmp_path, "\ufeff" + "\r\n".join(lines) + "\r\n\r\n", name)
        assert read_table(path, PLAIN).loss.tolist() == [3.1, 3.0]


def test_quoted_cells(tmp_path):
    path = write(tmp_path, 'N,D,loss\n"1,400,000","2,000,000,000",3.1\n2e8,1e9,3.0\n')
    assert read_table(path, PLAIN).params.tolist() == [1.4e6, 2e8]


def test_thousands_beside_larger_ones(tmp_path):
    """500,000 in a column that has 1,400,000 is no decimal comma."""
    path = write(tmp_path, 'N,D,loss\n"1,400,000","2e9",3.1\n"500,000",1e9,3.0\n')
    assert read_table(path, PLAIN).params.tolist() == [1.4e6, 5e5]


def test_lines_are_those_of_the_file(tmp_path):
    """A quoted cell of two lines, an empty line: a row's line is where it begins."""
    path = write(tmp_path, '\nN,D,loss,note\n1,2,3,"a\nb"\n\n4,5,6,c\n')
    assert read_table(path, PLAIN).line.tolist() == [3, 6]


def test_clusters_conditions_and_extras(tmp_path):
    text = "run,set,N,D,loss,U,lr,bad\n"
    text += "".join(
        f"{r},{s},1e8,{d},3.{d},5,0.1,x\n"
        for r, s, d in (("b", "p", 1), ("a", "p", 2), ("a", "p", 3), ("c", "q", 4))
    )
    path = write(tmp_path, text)
    runs = read_table(path, Columns("N", "loss", "D", cluster="run", unique="U", lr="lr"), ["set=p"])
    assert len(runs) == 3 and runs.dropped == {"not set=p": 1} and runs.clustered
    assert runs.cluster[1] == runs.cluster[2] != runs.cluster[0] and set(runs.cluster) == {0, 1}
    assert runs.unique.tolist() == [5, 5, 5]
    rest = runs.take(np.array([False, True, True]), "gone")
    assert rest.cluster.tolist() == [0, 0] and rest.dropped["gone"] == 1


@pytest.mark.parametrize(
    ("text", "columns", "where", "said"),
    [
        ("N,D,Loss\n1,2,3\n", PLAIN, (), "--loss: no column 'loss'. Perhaps 'Loss'. Its columns: N, D, Loss"),
        ("N,D,loss\n1,2,3\n", Columns("params", "loss", "D"), (), "--params: no column 'params'"),
        ("N,D,loss\n1,2,3\n", Columns("N", "loss"), (), "give --samples COL"),
        (
            "N,D,loss\n1,2,nan\n3,4,nan\n",
            PLAIN,
            (),
            "not one cell of 'loss' is a number; it holds 'nan', 'nan'",
        ),
        (
            "N,D,loss\nsmall,2,3\nbig,4,3\n",
            PLAIN,
            (),
            "--params: not one cell of 'N' is a number; it holds 'small', 'big'",
        ),
        (
            "N,D,loss\n1,,3\n,4,3\n",
            PLAIN,
            (),
            "not one of its 2 rows can be used: 1 N missing or no number; 1 D missing",
        ),
        ("N,D,loss\n1,2\n", PLAIN, (), "line 2: 2 cells, the header has 3"),
        ("N,D,N,loss\n1,2,3,4\n", PLAIN, (), "the column 'N' is there twice"),
        ("N;D;loss\n1;2;3,105\n", PLAIN, (), "line 2: 3,105: write decimal points, not commas"),
        ("N\tD\tloss\n1\t2\t3,215\n", PLAIN, (), "line 2: loss: 3,215: write decimal points, not commas"),
        ('N,D,loss\n1,2,3\n1,2,"3,215"\n', PLAIN, (), "line 3: loss: 3,215: write decimal points"),
        ('N,D,loss\n1,2,"3,2"\n', PLAIN, (), "line 2: loss: 3,2: write decimal points"),
        ('N,D,loss\n"1,215",2,3\n', PLAIN, (), "line 2: N: 1,215: write decimal points"),
        ('N,D,loss\n"1,215B",2,3\n', PLAIN, (), "line 2: N: 1,215B: write decimal points"),
        ('N,D,loss\n"1,400,000","0,215",3\n', PLAIN, (), "line 2: D: 0,215: write decimal points"),
        ('N,D,loss\n1,2,3\n1,"2,3\n' + "4,5,6\n" * 30000, PLAIN, (), "line 3: cannot be read as cells"),
        ('N,D,loss\n1,2,3\n1,"2,3\n4,5,6\n', PLAIN, (), "line 3: cannot be read as cells"),
        ("N|D|loss\n1|2|3\n", PLAIN, (), "found none of them in 'N|D|loss'; its cells seem to be separated by '|'"),
        ("N D loss\n1 2 3\n", PLAIN, (), "its cells seem to be separated by spaces"),
        ("# made by me\nN,D,loss\n1,2,3\n", PLAIN, (), "its first line is a comment (# made by me)"),
        ("# runs, all\nN,D,loss\n1,2,3\n", PLAIN, (), "its first line is a comment (# runs, all)"),
        ("N,D,loss\n", PLAIN, (), "expected a header and rows, got 1 lines"),
        ("", PLAIN, (), "expected a header and rows, got 0 lines"),
        ("N,D,loss,s\n1,2,3,a\n", PLAIN, ("s=b",), "--where s=b: no row has it; s holds a"),
        ("N,D,loss\n1,2,3\n", PLAIN, ("D",), "--where D: expected COLUMN=VALUE"),
        ("N,D,loss\n1,2,3\n", PLAIN, ("E=1",), "--where: no column 'E'"),
    ],
)
def test_one_clear_line(tmp_path, text, columns, where, said):
    with pytest.raises(ValueError) as error:
        read_table(write(tmp_path, text), columns, where)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_files_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="cannot read the table: No such file"):
        read_table(tmp_path / "none.csv", PLAIN)
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ValueError, match="not a UTF-8 text"):
        read_table(tmp_path / "binary.csv", PLAIN)
