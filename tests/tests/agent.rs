//! The agent in a real guest: users, limits, terminals, files, many requests at once, clients that
//! vanish. One guest serves all cases, as a boot takes seconds on a software KVM.

#[path = "agent/files.rs"]
mod files;
#[path = "agent/guest.rs"]
mod guest;
#[path = "agent/programs.rs"]
mod programs;
#[path = "agent/python.rs"]
mod python;
#[path = "agent/restored.rs"]
mod restored;
#[path = "agent/warm.rs"]
mod warm;

use std::process::ExitCode;

use tests::Needs::Guest;
use tests::test;

fn main() -> ExitCode {
    let code = tests::main(vec![
        test(
            "code_runs_without_privileges_unless_asked",
            Guest,
            programs::users,
        ),
        test(
            "twenty_programs_run_at_once_on_one_connection",
            Guest,
            programs::twenty,
        ),
        test(
            "a_terminal_has_a_size_that_changes",
            Guest,
            programs::terminal,
        ),
        test("memory_is_limited", Guest, programs::memory_limit),
        test(
            "processes_and_processor_time_are_limited",
            Guest,
            programs::other_limits,
        ),
        test(
            "time_that_is_over_ends_the_whole_tree",
            Guest,
            programs::timeout,
        ),
        test(
            "a_cancelled_program_ends_with_its_tree",
            Guest,
            programs::cancel,
        ),
        test(
            "a_client_that_vanishes_leaves_nothing",
            Guest,
            programs::vanish,
        ),
        test(
            "a_thousand_connections_leak_nothing",
            Guest,
            programs::thousand,
        ),
        test(
            "a_slow_reader_makes_the_program_wait",
            Guest,
            programs::slow_reader,
        ),
        test("files_are_written_read_and_listed", Guest, files::basics),
        test("files_are_written_whole_or_not_at_all", Guest, files::whole),
        test(
            "users_may_do_what_the_kernel_lets_them",
            Guest,
            files::permissions,
        ),
        test("trees_move_both_ways", Guest, files::trees),
        test("changes_are_told", Guest, files::changes),
        test(
            "a_restored_guest_is_made_its_own",
            Guest,
            restored::identity,
        ),
        test("a_full_disk_is_told", Guest, files::full),
        test(
            "a_hundred_mebibytes_move_intact_each_way",
            Guest,
            files::large,
        ),
        test(
            "a_client_in_python_follows_the_contract",
            Guest,
            python::client,
        ),
        test(
            "code_comes_out_of_a_warm_interpreter_as_of_a_cold_one",
            Guest,
            warm::outcomes,
        ),
        test(
            "requests_in_a_warm_interpreter_are_apart",
            Guest,
            warm::apart,
        ),
        test("limits_hold_in_a_warm_interpreter", Guest, warm::limits),
        test("a_killed_interpreter_comes_back", Guest, warm::killed),
        test(
            "a_module_that_cannot_be_imported_is_named",
            Guest,
            warm::refused,
        ),
    ]);
    guest::end();
    code
}
