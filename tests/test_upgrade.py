"""Environments, runs, attribution and bisection, on tiny local packages: no network, no torch."""

from __future__ import annotations

import os
import stat
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from conformance import environments, suite_run, upgrade
from conformance.attribution import attribute, bisect
from conformance.environments import build_layer, parse_pins, releases_between, resolve
from conformance.errors import InputError
from conformance.suite_run import Selection, start


def wheel(folder: Path, name: str, version: str, needs: Sequence[str] = ()) -> None:
    """A wheel of one module that knows its version."""
    info = f"{name}-{version}.dist-info"
    metadata = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}"]
    metadata += [f"Requires-Dist: {need}" for need in needs]
    files = {
        f"{name}.py": f"VERSION = {version!r}\n",
        f"{info}/METADATA": "\n".join(metadata) + "\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = [f"{path},," for path in [*files, f"{info}/RECORD"]]
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
        archive.writestr(f"{info}/RECORD", "\n".join(record) + "\n")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels as the only index, and a cache of its own."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    for version in ("1.0", "1.1", "1.2", "1.3"):
        wheel(folder, "demo_stack", version, [f"demo_base=={version}"])
        wheel(folder, "demo_base", version)
    wheel(folder, "demo_other", "2.0", ["demo_base==1.0"])
    for name in list(os.environ):
        if name.startswith("PIP_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("CONFORMANCE_CACHE", str(tmp_path / "cache"))
    return folder


def test_a_layer_holds_what_differs_and_python_sees_it(index: Path, tmp_path: Path) -> None:
    layer = resolve({"demo-stack": "1.1"})
    assert layer == {"demo-stack": "1.1", "demo-base": "1.1"}
    found = build_layer(layer)
    assert found.layer is not None and found.versions["demo-base"] == "1.1"
    assert "demo_stack.py" in {path.name for path in found.layer.iterdir()}
    again = build_layer(layer)
    assert again.layer == found.layer and again.key == found.key
    assert len(list((tmp_path / "cache" / "layers").iterdir())) == 1


def test_what_is_installed_already_needs_no_layer() -> None:
    found = build_layer({})
    assert found.layer is None and found.versions["pytest"] == pytest.__version__


@pytest.mark.parametrize(
    ("pins", "message"),
    [
        ({"demo-stack": "9.9"}, "demo-stack==9.9: not on the index; the newest there is 1.3"),
        ({"demo-nothing": "1.0"}, "demo-nothing==1.0: no such package"),
        ({"demo-stack": "1.1", "demo-other": "2.0"}, "conflicting"),
    ],
)
def test_bad_requirements_are_refused_before_anything_is_installed(
    pins: dict[str, str], message: str, index: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message) as error:
        resolve(pins)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ("WARNING: Retrying after connection broken by 'ProxyError(1)': /simple", "ProxyError"),
        ("ERROR: Exception:\nTraceback\nOSError: [Errno 28] No space left on device", "No space"),
        ("", "pip says: nothing"),
        (
            "ERROR: ResolutionImpossible\n The user requested a==1\n b 2 depends on a>1",
            "b 2 depends",
        ),
    ],
)
def test_what_pip_says_in_many_lines_is_one(said: str, line: str) -> None:
    found = environments.explain_pip(said, ["a==1"])
    assert line in found and "\n" not in found and found.startswith("a==1: ")


def test_a_full_environment_takes_the_build_of_torch_that_is_active(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CONFORMANCE_TORCH", raising=False)
    assert environments.torch_build("2.13.0+cpu") == {"UV_TORCH_BACKEND": "cpu"}
    assert environments.torch_build("2.13.0") == {}
    monkeypatch.setenv("CONFORMANCE_TORCH", "index")
    assert environments.torch_build("2.13.0+cpu") == {}


def test_what_stays_installed_must_accept_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments, "requires", lambda name: ["huggingface-hub>=1.0"])
    with pytest.raises(InputError, match=r"needs huggingface-hub>=1.0, not 0.3; pin torch as well"):
        environments._refuse_conflicts({"huggingface-hub": "0.3"})


def test_a_layer_that_fails_leaves_nothing_behind(index: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError):
        build_layer({"demo-stack": "9.9"})
    assert list((tmp_path / "cache" / "layers").iterdir()) == []


@pytest.mark.parametrize(
    "text",
    ["transformers", "transformers>=5", "transformers==5.*", "a b==1", "peft[x]==1", "; rm -rf ~"],
)
def test_only_exact_versions_are_pins(text: str) -> None:
    with pytest.raises(InputError, match="--from") as error:
        parse_pins([text], "--from")
    assert "\n" not in str(error.value)


def test_pins_are_read_from_one_text_or_several() -> None:
    expected = {"transformers": "5.17.0", "peft": "0.20.0"}
    assert parse_pins(["transformers==5.17.0 peft==0.20.0"], "--from") == expected
    assert parse_pins(["transformers==5.17.0", "PEFT==0.20.0"], "--from") == expected


def test_released_versions_between_two(index: Path) -> None:
    assert releases_between("demo-stack", "1.0", "1.2") == ["1.1", "1.2"]
    with pytest.raises(InputError, match="lists no versions"):
        releases_between("demo-nothing", "1.0", "1.2")


OLD = {"a": "1", "b": "1", "c": "1"}
NEW = {"a": "2", "b": "2", "c": "2"}


def answer(pins: Mapping[str, str], cases: Sequence[str]) -> dict[str, str]:
    """x breaks with b 2; y with a 2 and c 2 together; nothing else does."""
    bad = {
        "x": pins["b"] == "2",
        "y": pins["a"] == "2" and pins["c"] == "2",
    }
    return {case: "failed" if bad[case] else "passed" for case in cases}


def test_the_package_to_blame_is_found_by_swapping_one_at_a_time() -> None:
    assert attribute(["x", "y"], OLD, NEW, answer) == {"x": ("b",), "y": ("a", "c")}
    assert attribute(["x"], {"b": "1"}, {"b": "2"}, answer) == {"x": ("b",)}


def test_mixtures_that_cannot_be_installed_are_said_not_guessed() -> None:
    said: list[str] = []

    def ask(pins: Mapping[str, str], cases: Sequence[str]) -> dict[str, str]:
        if len(set(pins.values())) > 1:
            raise InputError("conflicting")
        return answer(pins, cases)

    assert attribute(["x"], OLD, NEW, ask, said.append) == {}
    assert said and all("conflicting" in line for line in said)


def test_bisection_finds_each_release_with_few_runs() -> None:
    releases = [str(n) for n in range(1, 17)]
    asked: list[tuple[str, ...]] = []

    def ask(pins: Mapping[str, str], cases: Sequence[str]) -> dict[str, str]:
        asked.append(tuple(cases))
        if pins["p"] == "8":
            raise InputError("not installable")
        broke = {"x": 5, "y": 13, "z": 5}
        return {c: "failed" if int(pins["p"]) >= broke[c] else "passed" for c in cases}

    found = bisect(["x", "y", "z"], "p", {"p": "0"}, releases, ask)
    assert found == {"x": "5", "y": "13", "z": "5"}
    assert len(asked) <= 9


def fake_python(path: Path, body: str) -> str:
    """An interpreter that only knows one thing to do."""
    path.write_text(f"#!{sys.executable}\nimport sys\n{body}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


WRITE = """
from pathlib import Path
sys.path.insert(0, {root!r})
from conformance.report import Report, Row, write
out = next(a for a in sys.argv if a.startswith("--report=")).partition("=")[2]
bad = {bad!r} in sys.argv[0]
verdict = "failed" if bad else "passed"
write(Report("x", (Row("A01/m/-/single", verdict), Row("B01/m/-/single", "passed"))), out)
sys.exit(int(bad))
"""
ROOT = str(Path(__file__).parent.parent)


def judged(tmp_path: Path, **options: object) -> tuple[upgrade.Upgrade, list[str]]:
    """An upgrade whose two environments are interpreters that write a report."""
    said: list[str] = []
    request = upgrade.Request(("demo==1",), ("demo==2",), root=tmp_path / "cache", **options)
    found = upgrade.Upgrade(request, said.append, lambda runs: None)
    body = WRITE.format(root=ROOT, bad="python-2")
    pythons = {n: fake_python(tmp_path / f"python-{n}", body) for n in ("1", "2")}

    def build(layer: Mapping[str, str], pins: Mapping[str, str]) -> environments.Environment:
        return environments.Environment(pythons[pins["demo"]], None, dict(pins))

    found.build = build  # type: ignore[method-assign]
    return found, said


def test_an_upgrade_runs_both_sides_compares_and_attributes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upgrade, "resolve", lambda pins, root: dict(pins))
    found = judged(tmp_path, keep=tmp_path / "kept")[0].judge()
    assert found.exit == 1
    assert found.attribution == {"A01/m/-/single": "demo 1 → 2"}
    repeat = "conformance upgrade --from demo==1 --to demo==2 --case A01/m/-/single"
    assert [change.repeat for change in found.sections["broken"]] == [repeat]
    assert sorted(p.name for p in (tmp_path / "kept").iterdir()) == ["after.json", "before.json"]


def test_what_fixed_a_case_is_said_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upgrade, "resolve", lambda pins, root: dict(pins))
    judge, _ = judged(tmp_path)
    judge.request = replace(judge.request, before=("demo==2",), after=("demo==1",))
    found = judge.judge()
    assert found.exit == 0 and found.attribution == {"A01/m/-/single": "demo 2 → 1"}


def test_a_second_judgement_comes_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upgrade, "resolve", lambda pins, root: dict(pins))
    first = judged(tmp_path)[0].judge()
    judge, _ = judged(tmp_path)
    for number in ("1", "2"):
        fake_python(tmp_path / f"python-{number}", "sys.exit('must not run')")
    assert judge.judge().verdict == first.verdict


def test_a_run_without_a_report_is_one_line_and_not_kept(tmp_path: Path) -> None:
    python = fake_python(tmp_path / "python", "print('E   RuntimeError: no wheels'); sys.exit(3)")
    environment = environments.Environment(python, None, {})
    run = start(environment, Selection(), "from x", tmp_path / "cache")
    with pytest.raises(InputError, match="RuntimeError: no wheels") as error:
        run.result()
    assert "\n" not in str(error.value)
    again = start(environment, Selection(), "from x", tmp_path / "cache")
    again.stop()
    assert not again.cached


def test_no_case_matching_is_said(tmp_path: Path) -> None:
    python = fake_python(tmp_path / "python", "sys.exit(5)")
    run = start(environments.Environment(python, None, {}), Selection(), "x", tmp_path / "cache")
    with pytest.raises(InputError, match="no case matches the selection"):
        run.result()


def test_the_command_of_a_run_is_a_list_never_a_shell_line() -> None:
    hostile = Selection(markers="a; rm -rf ~", cases=("$(reboot)/m/-/single",))
    line = suite_run.command_line(hostile, Path("r.json"))
    assert "a; rm -rf ~" in line and "--case=$(reboot)/m/-/single" in line


def test_the_revision_follows_the_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine_a.py").write_text("IMPLEMENTATION = 1\n")
    (tmp_path / "mine_b.py").write_text("IMPLEMENTATION = 2\n")
    names = ("mine_a:IMPLEMENTATION", "mine_b:IMPLEMENTATION", "transformers")
    assert len({suite_run.suite_revision(name) for name in names}) == 3


def test_every_reader_of_records_is_a_module_of_the_suite() -> None:
    missing = [n for n in suite_run.READERS if not (suite_run.HERE / f"{n}.py").exists()]
    assert missing == []
