"""Several processes share units of work, agree on what they do, and end together."""

from pathlib import Path

import pytest
import rank_jobs
from rank_processes import rank_processes

from nemo_ext.errors import NemoError
from nemo_ext.ranks.parts import Parts
from nemo_ext.ranks.ranks import Ranks


def test_a_single_process_does_all_units_in_order() -> None:
    done: list[int] = []
    ranks = Ranks()
    with ranks:
        assert list(ranks.units(["a", "b", "c"], done.append)) == ["a", "b", "c"]
        assert ranks.from_first(lambda: 3) == 3
        ranks.agree({"model": "a"})
        ranks.meet()
    assert done == [1, 1, 1]


def test_each_unit_is_done_once_and_by_whoever_is_free() -> None:
    with rank_processes(3, rank_jobs.share_units, 30) as running:
        codes, said = running.results()
    assert codes == [0, 0, 0]
    assert sorted(unit for units in said.values() for unit in units) == list(range(30))
    (slow,) = (units for units in said.values() if 0 in units)
    assert len(slow) < 10  # the others did not wait for the long one


def test_rank_0_is_told_of_all_units_that_are_done() -> None:
    with rank_processes(2, rank_jobs.count_done, 40) as running:
        _, said = running.results()
    assert said == {0: 40, 1: 0}


def test_all_ranks_get_what_rank_0_makes() -> None:
    with rank_processes(3, rank_jobs.from_first) as running:
        codes, said = running.results()
    assert codes == [0, 0, 0]
    assert said == dict.fromkeys(range(3), ({"rank": 0}, ["ü", 2.5]))


@pytest.mark.parametrize("which", [0, 1])
def test_a_failure_ends_all_ranks_at_once_and_rank_0_can_say_why(which: int) -> None:
    with rank_processes(2, rank_jobs.fail, which) as running:
        codes, said = running.results(timeout=60)
    assert codes == [1, 1]
    assert said[0] == ("there is no paper left" if which == 0 else "rank 1: there is no paper left")


def test_a_failure_ends_ranks_in_the_background_too() -> None:
    with rank_processes(2, rank_jobs.fail_in_the_background) as running:
        codes, said = running.results(timeout=60)
    assert codes == [1, 1]
    assert said[0] == "there is no paper left"


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    with rank_processes(2, rank_jobs.fill_the_disk, str(tmp_path / "part.json")) as running:
        _, said = running.results(timeout=60)
    assert said[0] == f"rank 1: {tmp_path}/part.json: No space left on device"


def test_more_ranks_than_units_are_told_once() -> None:
    with rank_processes(3, rank_jobs.warned, 1) as running:
        codes, said = running.results(timeout=60)
    assert codes == [0, 0, 0]
    assert said == {0: ["3 ranks share 1 units of work, so that 2 of them have nothing to do"], 1: [], 2: []}


def test_one_rank_that_is_stopped_stops_all() -> None:
    with rank_processes(2, rank_jobs.stop) as running:
        codes, _ = running.results(timeout=60)
    assert codes == [130, 130]


def test_ranks_that_see_different_models_are_told_which() -> None:
    facts = [{"model": "a", "list of prompts": "x"}, {"model": "a", "list of prompts": "y"}]
    with rank_processes(2, rank_jobs.agree, facts) as running:
        codes, said = running.results(timeout=60)
    assert codes == [1, 1]
    assert said[0] == "rank 1 has another list of prompts than rank 0: y, wanted x"
    with rank_processes(2, rank_jobs.agree, [facts[0]] * 2) as running:
        assert running.results(timeout=60) == ([0, 0], {0: "agreed", 1: "agreed"})


def test_a_rank_that_is_lost_is_not_waited_for_forever() -> None:
    with rank_processes(3, rank_jobs.lose_one) as running:
        codes, said = running.results(timeout=60)
    assert codes == [1, 1, 0]
    assert "rank 2 has not been heard of for 3 s" in said[0]


def test_ranks_that_see_different_folders_are_refused(tmp_path: Path) -> None:
    paths = [str(tmp_path / "one"), str(tmp_path / "other")]
    with rank_processes(2, rank_jobs.open_parts, paths) as running:
        codes, said = running.results(timeout=60)
    assert codes == [1, 1]
    assert "is not the folder that rank 0 sees under this name: all ranks need one file system" in said[0]


class TestParts:
    def test_parts_of_other_settings_are_refused(self, tmp_path: Path) -> None:
        with Parts(tmp_path / "p", {"model": "a", "seeds": 2}).open(Ranks()):
            pass
        with (
            pytest.raises(NemoError, match=r"earlier run with another seeds: 2, now 3; choose another file, or delete"),
            Parts(tmp_path / "p", {"model": "a", "seeds": 3}).open(Ranks()),
        ):
            pass

    def test_two_jobs_do_not_share_a_folder(self, tmp_path: Path) -> None:
        with (
            Parts(tmp_path, {}).open(Ranks()),
            pytest.raises(NemoError, match="another process writes to"),
            Parts(tmp_path, {}).open(Ranks()),
        ):
            pass

    def test_what_is_there_is_not_made_again(self, tmp_path: Path) -> None:
        parts = Parts(tmp_path, {})
        made: list[int] = []

        def make(place: int, file: Path) -> None:
            made.append(place)
            parts.write(file.name, place)

        done: list[int] = []
        with parts.open(Ranks()):
            parts.write("1.json", 1)
            files = parts.do(["0.json", "1.json", "2.json"], make, Ranks(), done.append)
            assert [parts.read(file.name) for file in files] == [0, 1, 2]
        assert made == [0, 2]
        assert sum(done) == 3

    @pytest.mark.parametrize("damage", [b"", b"{", b"[1]"])
    def test_damaged_settings_are_refused(self, tmp_path: Path, damage: bytes) -> None:
        (tmp_path / "settings.json").write_bytes(damage)
        with pytest.raises(NemoError, match="does not hold settings"), Parts(tmp_path, {}).open(Ranks()):
            pass
