/*
 * Runs a program instruction by instruction and prints each address that it executed, once, in order; and,
 * after a line "-", again those that it executes from when it first waits in epoll or poll. Ends when it is
 * killed, and the program with it. For static programs at fixed addresses below 8 MiB.
 */
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

#define LIMIT (8UL << 20)
#define SYSCALL_OPCODE 0x050f

static unsigned char seen[LIMIT];

static int is_wait(unsigned long number)
{
	return number == SYS_ppoll || number == SYS_epoll_wait || number == SYS_epoll_pwait ||
	       number == SYS_epoll_pwait2;
}

int main(int argc, char **argv)
{
	int status, has_waited = 0;
	pid_t child = argc > 1 ? fork() : -1;

	if (child < 0) {
		fprintf(stderr, "usage: step PROGRAM [ARGUMENT...]\n");
		return 2;
	}
	if (child == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		ptrace(PTRACE_TRACEME, 0, 0, 0);
		execv(argv[1], argv + 1);
		_exit(127);
	}
	setlinebuf(stdout);
	while (waitpid(child, &status, 0) == child && WIFSTOPPED(status)) {
		struct user_regs_struct regs;

		ptrace(PTRACE_GETREGS, child, 0, &regs);
		if (regs.rip < LIMIT && !seen[regs.rip]) {
			seen[regs.rip] = 1;
			printf("%llx\n", regs.rip);
		}
		if (!has_waited && is_wait(regs.rax) &&
		    (ptrace(PTRACE_PEEKTEXT, child, regs.rip, 0) & 0xffff) == SYSCALL_OPCODE) {
			has_waited = 1;
			memset(seen, 0, sizeof(seen));
			printf("-\n");
		}
		ptrace(PTRACE_SINGLESTEP, child, 0, 0);
	}
	fprintf(stderr, "step: %s has ended\n", argv[1]);
	return 1;
}
