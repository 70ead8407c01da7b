/*
 * Runs a program instruction by instruction until it first waits in ppoll(2), and prints each address
 * that it executed, once, in order. For static programs at fixed addresses below 8 MiB.
 */
#include <signal.h>
#include <stdio.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

#define LIMIT (8UL << 20)
#define SYSCALL_OPCODE 0x050f

static unsigned char seen[LIMIT];

int main(int argc, char **argv)
{
	int status;
	pid_t child = argc > 1 ? fork() : -1;

	if (child < 0) {
		fprintf(stderr, "usage: step PROGRAM [ARGUMENT...]\n");
		return 2;
	}
	if (child == 0) {
		ptrace(PTRACE_TRACEME, 0, 0, 0);
		execv(argv[1], argv + 1);
		_exit(127);
	}
	while (waitpid(child, &status, 0) == child && WIFSTOPPED(status)) {
		struct user_regs_struct regs;

		ptrace(PTRACE_GETREGS, child, 0, &regs);
		if (regs.rip < LIMIT && !seen[regs.rip]) {
			seen[regs.rip] = 1;
			printf("%llx\n", regs.rip);
		}
		if (regs.rax == SYS_ppoll &&
		    (ptrace(PTRACE_PEEKTEXT, child, regs.rip, 0) & 0xffff) == SYSCALL_OPCODE) {
			kill(child, SIGKILL);
			waitpid(child, &status, 0);
			return 0;
		}
		ptrace(PTRACE_SINGLESTEP, child, 0, 0);
	}
	fprintf(stderr, "step: %s did not come to wait\n", argv[1]);
	return 1;
}
