//! Snapshots of a real guest: what was is there again, and goes on as if nothing had been.
//!
//! A guest boots once, and the cache of boots gives it to every test; each has a store of its own.

#[path = "snapshot/chains.rs"]
mod chains;
#[path = "snapshot/copies.rs"]
mod copies;
#[path = "snapshot/disks.rs"]
mod disks;
#[path = "snapshot/going_on.rs"]
mod going_on;
#[path = "snapshot/guest.rs"]
mod guest;
#[path = "snapshot/kept_boots.rs"]
mod kept_boots;
#[path = "snapshot/programs.rs"]
mod programs;
#[path = "snapshot/raw_disk.rs"]
mod raw_disk;
#[path = "snapshot/refusals.rs"]
mod refusals;

use std::process::ExitCode;

use tests::Needs::Guest;
use tests::test;

fn main() -> ExitCode {
    tests::main(vec![
        test(
            "files_and_programs_go_on_in_each_copy",
            Guest,
            going_on::copies,
        ),
        test(
            "a_snapshot_is_the_memory_of_one_moment",
            Guest,
            going_on::one_moment,
        ),
        test(
            "a_program_is_not_disturbed_by_a_snapshot",
            Guest,
            going_on::undisturbed,
        ),
        test("snapshots_rest_on_snapshots", Guest, chains::depth),
        test(
            "a_guest_whose_pages_are_missing_is_saved",
            Guest,
            chains::missing_pages,
        ),
        test(
            "no_copy_has_the_random_numbers_of_another",
            Guest,
            copies::identity,
        ),
        test(
            "a_guest_that_boots_has_the_time",
            Guest,
            copies::time_of_a_boot,
        ),
        test("many_copies_work_at_once", Guest, copies::many),
        test("each_copy_has_disks_of_its_own", Guest, disks::copies),
        test(
            "a_disk_is_saved_as_of_the_moment_of_memory",
            Guest,
            disks::one_moment,
        ),
        test("the_second_run_need_not_boot", Guest, kept_boots::runs),
        test(
            "what_is_not_as_it_was_is_refused",
            Guest,
            refusals::not_as_it_was,
        ),
        test(
            "a_corrupt_page_ends_the_sandbox",
            Guest,
            refusals::corrupt_page,
        ),
        test(
            "programs_of_clients_run_on_in_each_copy",
            Guest,
            programs::run_on,
        ),
        test(
            "programs_run_on_where_all_connections_are_lost",
            Guest,
            programs::all_lost,
        ),
        test(
            "an_agent_that_has_lost_its_lane_calls_again",
            Guest,
            programs::lane_lost,
        ),
        test(
            "a_layer_that_is_cut_short_ends_the_sandbox",
            Guest,
            refusals::cut_layer,
        ),
    ])
}
