from mrpo.seeding import derive_seed


def test_every_part_matters_and_parts_do_not_run_together() -> None:
    seeds = {derive_seed("a", 1), derive_seed("a", 2), derive_seed("b", 1), derive_seed("a1"), derive_seed("a", 1, 0)}
    assert len(seeds) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_the_value_is_fixed_for_all_time() -> None:
    # A change here would silently change every run that is resumed or repeated.
    assert derive_seed("rollout", 0, 7, "phantom/0/train/3") == 2850116442193067718
