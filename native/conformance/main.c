/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Runs cases on one provider, each in a process of its own:
 *
 *   conformance --list
 *   conformance [OPTIONS] PROVIDER RAIL [CASE…]
 *
 * A line for each: ok, skipped (the provider says that it has not what the case is about) or FAILED; ends with 1 if one failed.
 */
#include <getopt.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include "cases.h"
#include "conformance.h"
#include "core/barrier.h"

#define CASE_SECONDS 60
#define JOBS_MAX 16

struct test_case {
	const char *name;
	void (*run)(void);
	const char *text;
};

static const struct test_case cases[] = {
#define AS_ENTRY(name, text) { #name, case_##name, text },
	CONFORMANCE_CASES(AS_ENTRY)
#undef AS_ENTRY
};

#define CASE_COUNT (sizeof(cases) / sizeof(cases[0]))

struct outcome *outcome;
struct settings settings = { .load = 100 };
struct tfd_error error;

/* ---- outcome ---- */

void outcome_at(const char *file, int line)
{
	tfd_store_relaxed(&outcome->file, file); /* of whichever thread */
	tfd_store_relaxed(&outcome->line, (uint32_t)line);
}

static void outcome_end(uint32_t state, const char *format, va_list arguments)
{
	(void)vsnprintf(outcome->text, sizeof(outcome->text), format, arguments);
	outcome->state = state;
}

void outcome_fail(const char *file, int line, const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	outcome_at(file, line);
	outcome_end(OUTCOME_FAILED, format, arguments);
	va_end(arguments);
	_exit(1);
}

void outcome_skip(const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	outcome_end(OUTCOME_SKIPPED, format, arguments);
	va_end(arguments);
	_exit(0);
}

void outcome_remark(const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	(void)vsnprintf(outcome->text, sizeof(outcome->text), format, arguments);
	va_end(arguments);
}

/* ---- cases ---- */

static void tell(const struct test_case *test, double seconds)
{
	static const char *const words[] = { "?", "ok", "skipped", "FAILED" };

	(void)printf("%-8s %-24s %5.2f s", words[outcome->state], test->name, seconds);
	if (outcome->state == OUTCOME_FAILED)
		(void)printf("  %s:%u:", outcome->file ? outcome->file : "?", outcome->line);
	(void)printf("%s%s\n", outcome->text[0] ? "  " : "", outcome->text);
	(void)fflush(stdout);
}

static void fail_by_status(int status, bool late)
{
	if (outcome->state == OUTCOME_FAILED)
		return;
	if (late)
		(void)snprintf(outcome->text, sizeof(outcome->text), "no end within the time; reached last");
	else if (WIFSIGNALED(status))
		(void)snprintf(outcome->text, sizeof(outcome->text), "%s; reached last",
		               strsignal(WTERMSIG(status)));
	else
		(void)snprintf(outcome->text, sizeof(outcome->text), "ended with %d; reached last",
		               WEXITSTATUS(status));
	outcome->state = OUTCOME_FAILED;
}

static void run_here(const struct test_case *test)
{
	test->run();
	outcome->state = OUTCOME_OK;
}

/* A case in a process of its own. */
struct child {
	const struct test_case *test;
	struct outcome *outcome;
	pid_t pid; /* 0: none */
	uint64_t begin_ns;
};

static void child_begin(struct child *child, const struct test_case *test)
{
	child->test = test;
	child->begin_ns = tfd_now_ns();
	memset(child->outcome, 0, sizeof(*child->outcome));
	outcome = child->outcome;
	(void)fflush(NULL);
	child->pid = fork();
	if (child->pid == 0) {
		run_here(test);
		exit(0); /* so that leaks are looked for */
	}
	if (child->pid < 0) {
		(void)fprintf(stderr, "conformance: fork: %s\n", strerror(errno));
		exit(2);
	}
}

/* Whether it is at its end; *failed: and how. */
static bool child_look(struct child *child, unsigned seconds, bool *failed)
{
	uint64_t took_ns = tfd_now_ns() - child->begin_ns;
	bool late = false;
	int status;

	if (waitpid(child->pid, &status, WNOHANG) == 0) {
		if (took_ns < seconds * 1000000000ull)
			return false;
		late = true;
		(void)kill(child->pid, SIGKILL);
		(void)waitpid(child->pid, &status, 0);
	}
	child->pid = 0;
	outcome = child->outcome;
	if (late || status != 0)
		fail_by_status(status, late);
	tell(child->test, (double)took_ns / 1e9);
	*failed = outcome->state == OUTCOME_FAILED;
	return true;
}

static const struct test_case *find_case(const char *name)
{
	for (size_t i = 0; i < CASE_COUNT; i++) {
		if (strcmp(cases[i].name, name) == 0)
			return &cases[i];
	}
	return NULL;
}

/* ---- arguments ---- */

static _Noreturn void usage(int status)
{
	(void)fprintf(status ? stderr : stdout,
	              "conformance --list\n"
	              "conformance [OPTIONS] PROVIDER RAIL [CASE...]\n"
	              "  --far RAIL       the other side's; default: the same\n"
	              "  --fabric TEXT    as fabric.name of the configuration; of sim its parameters\n"
	              "  --library PATH   of libfabric or libibverbs\n"
	              "  --device         memory is that of a GPU, which a thread copies; of staged\n"
	              "  --load PERCENT   of the usual numbers of posts; default 100\n"
	              "  --seconds N      that a case may take; default %d\n"
	              "  --jobs N         cases at once, at most %d; default 1\n"
	              "  --here           in this process, for a debugger; the first failure ends it\n",
	              CASE_SECONDS, JOBS_MAX);
	exit(status);
}

static void list_cases(void)
{
	for (size_t i = 0; i < CASE_COUNT; i++)
		(void)printf("%-24s %s\n", cases[i].name, cases[i].text);
}

static void copy_text(char *to, size_t bytes, const char *from)
{
	if (strlen(from) >= bytes) {
		(void)fprintf(stderr, "conformance: \"%s\" is longer than %zu bytes\n", from, bytes - 1);
		exit(2);
	}
	memcpy(to, from, strlen(from) + 1);
}

/* Chosen by name, or all. How many failed. */
static int run_cases(char **names, int count, unsigned seconds, unsigned jobs, bool here)
{
	static struct child children[JOBS_MAX];
	size_t chosen = count ? (size_t)count : CASE_COUNT;
	int failed = 0;

	for (int i = 0; i < count; i++) {
		if (find_case(names[i]))
			continue;
		(void)fprintf(stderr, "conformance: there is no case \"%s\"; --list tells which there are\n",
		              names[i]);
		exit(2);
	}
	outcome = mmap(NULL, jobs * sizeof(*outcome), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1,
	               0);
	if (outcome == MAP_FAILED) {
		(void)fprintf(stderr, "conformance: mmap: %s\n", strerror(errno));
		exit(2);
	}
	for (uint32_t i = 0; i < jobs; i++)
		children[i].outcome = &outcome[i];
	for (size_t i = 0; here && i < chosen; i++)
		run_here(count ? find_case(names[i]) : &cases[i]);
	for (size_t next = 0, running = 0; !here && (next < chosen || running);) {
		for (uint32_t i = 0; i < jobs; i++) {
			bool child_failed = false;

			if (!children[i].pid && next < chosen) {
				child_begin(&children[i], count ? find_case(names[next]) : &cases[next]);
				next++;
				running++;
			} else if (children[i].pid && child_look(&children[i], seconds, &child_failed)) {
				running--;
			}
			failed += child_failed;
		}
		(void)usleep(500);
	}
	return failed;
}

/* As a daemon's limits should be: some providers take dozens of descriptors for a connection. */
static void raise_limit(void)
{
	struct rlimit files;

	if (getrlimit(RLIMIT_NOFILE, &files) == 0) {
		files.rlim_cur = files.rlim_max;
		(void)setrlimit(RLIMIT_NOFILE, &files);
	}
}

int main(int argc, char **argv)
{
	static const struct option known[] = {
		{ "list", no_argument, NULL, 'l' },
		{ "far", required_argument, NULL, 'f' },
		{ "fabric", required_argument, NULL, 'n' },
		{ "library", required_argument, NULL, 'y' },
		{ "load", required_argument, NULL, 'o' },
		{ "seconds", required_argument, NULL, 's' },
		{ "jobs", required_argument, NULL, 'j' },
		{ "here", no_argument, NULL, 'H' },
		{ "help", no_argument, NULL, 'h' },
		{ "device", no_argument, NULL, 'd' },
		{ 0 },
	};
	struct tfd_group_options *options = &settings.options;
	const char *far = NULL;
	unsigned seconds = CASE_SECONDS, jobs = 1;
	bool here = false;
	int option;

	while ((option = getopt_long(argc, argv, "+h", known, NULL)) != -1) {
		if (option == 'l') {
			list_cases();
			return 0;
		}
		if (option == 'f')
			far = optarg;
		else if (option == 'n')
			copy_text(options->fabric, sizeof(options->fabric), optarg);
		else if (option == 'y')
			copy_text(options->library, sizeof(options->library), optarg);
		else if (option == 'o')
			settings.load = (unsigned)strtoul(optarg, NULL, 10);
		else if (option == 's')
			seconds = (unsigned)strtoul(optarg, NULL, 10);
		else if (option == 'j')
			jobs = (unsigned)strtoul(optarg, NULL, 10);
		else if (option == 'H')
			here = true;
		else if (option == 'd')
			settings.device = true;
		else
			usage(option == 'h' ? 0 : 2);
	}
	if (argc - optind < 2 || !settings.load || !seconds || !jobs || jobs > JOBS_MAX)
		usage(2);
	settings.ops = tfd_provider_find(argv[optind]);
	if (!settings.ops) {
		(void)fprintf(stderr, "conformance: there is no provider \"%s\"\n", argv[optind]);
		return 2;
	}
	if (settings.device && settings.ops->path_id != TFD_PATH_STAGED) {
		(void)fprintf(stderr, "conformance: --device is of provider staged\n");
		return 2;
	}
	copy_text(options->provider, sizeof(options->provider), argv[optind]);
	settings.rails[0] = argv[optind + 1];
	raise_limit();
	settings.rails[1] = far ? far : settings.rails[0];
	return run_cases(argv + optind + 2, argc - optind - 2, seconds, jobs, here) != 0;
}
