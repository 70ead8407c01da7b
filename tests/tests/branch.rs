//! Children of a real guest: each goes on from the moment it has in common with the others, by itself.

#[path = "branch/asked.rs"]
mod asked;
#[path = "branch/children.rs"]
mod children;
#[path = "branch/drives.rs"]
mod drives;
#[path = "branch/explore.rs"]
mod explore;
#[path = "branch/files.rs"]
mod files;
#[path = "snapshot/guest.rs"]
mod guest;
#[path = "branch/pool.rs"]
mod pool;
#[path = "snapshot/raw_disk.rs"]
mod raw_disk;
#[path = "branch/rollback.rs"]
mod rollback;

use std::process::ExitCode;

use tests::Needs::Guest;
use tests::test;

fn main() -> ExitCode {
    tests::main(vec![
        test("a_program_goes_on_in_every_child", Guest, children::go_on),
        test("no_number_is_drawn_twice", Guest, children::draw),
        test("a_script_branches_itself", Guest, asked::by_a_script),
        test("what_a_script_makes_ends_in_time", Guest, asked::for_a_time),
        test("who_waits_is_told", Guest, asked::waiting),
        test("children_branch_in_turn", Guest, children::generations),
        test("one_may_die_before_the_other", Guest, children::deaths),
        test(
            "there_are_all_children_or_none",
            Guest,
            children::all_or_none,
        ),
        test("a_child_becomes_a_snapshot", Guest, children::commit),
        test(
            "a_child_goes_back_again_and_again",
            Guest,
            rollback::again_and_again,
        ),
        test(
            "a_sandbox_goes_back_to_a_snapshot",
            Guest,
            rollback::to_a_snapshot,
        ),
        test("differences_are_counted", Guest, rollback::differences),
        test("files_that_differ_are_told", Guest, files::told),
        test("each_child_has_drives_of_its_own", Guest, drives::family),
        test("a_pool_gives_its_processes_away", Guest, pool::serves),
        test("the_first_success_is_kept", Guest, explore::first_success),
        test("the_best_score_is_kept", Guest, explore::score),
        test("who_waits_for_its_turn_stands_still", Guest, explore::turns),
        test(
            "nothing_is_left_of_what_nobody_waits_for",
            Guest,
            explore::cut_short,
        ),
    ])
}
