/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Fuzz target: a client that writes anything into its segment. Input: 8 bytes by which tail moves, then ring entries. The daemon
 * must end the session or refuse the entries; a crash, a hang or a sanitizer report is a find.
 *
 *   clang -fsanitize=fuzzer,address … fuzz/fuzz_ring.c      coverage-guided
 *   make -C native fuzz                                     gcc: random inputs by a driver of its own
 */
#include "tests/core_fixture.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

static struct host host;
static struct user user, target;
static uint64_t out_conn, in_conn, grant;

static void fresh_user(void)
{
	user_open(&host, &user);
	grant = open_grant(&user, &target, out_conn);
}

static void start(void)
{
	host_open(&host);
	user_open(&host, &target);
	connect_hosts(&host, &host, &out_conn, &in_conn);
	fresh_user();
}

/* True once the session was found broken; else everything was taken. */
static int settled_broken(void)
{
	for (int i = 0; i < 20000; i++) {
		struct tfd_event event;

		while (tfd_core_events(host.core, &event, 1)) {
			CHECK(event.type != TFD_EVENT_CONN_LOST);
			if (event.type == TFD_EVENT_SESSION_BROKEN && event.id == user.session)
				return 1;
		}
		if (tfd_load_acquire(&user.ring->head) == user.ring->tail)
			return 0;
		(void)usleep(50);
	}
	(void)fprintf(stderr, "the session neither moves nor ends\n");
	abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
	uint64_t one = 1;
	uint64_t step;

	if (!host.core)
		start();
	if (bytes < sizeof(step))
		return 0;
	memcpy(&step, data, sizeof(step));
	data += sizeof(step);
	bytes -= sizeof(step);
	for (uint32_t i = 0; bytes; i++) {
		size_t part = bytes < sizeof(struct tfd_entry) ? bytes : sizeof(struct tfd_entry);

		memcpy(&user.entries[(user.ring->tail + i) % 64], data, part);
		data += part;
		bytes -= part;
	}
	tfd_store_seq(&user.ring->tail, user.ring->tail + (uint32_t)(step % 4 ? step % 65 : step));
	(void)!write(user.fds.doorbell_fd, &one, sizeof(one));
	if (settled_broken()) {
		user_close(&user);
		fresh_user();
	}
	return 0;
}

#ifdef TFD_FUZZ_DRIVER
int main(int argc, char **argv)
{
	long runs = argc > 1 ? strtol(argv[1], NULL, 10) : 20000;
	uint64_t state = argc > 2 ? strtoull(argv[2], NULL, 10) : 1;
	_Alignas(TFD_LINE) uint8_t input[sizeof(uint64_t) + 8 * sizeof(struct tfd_entry)];

	start();
	for (long run = 0; run < runs; run++) {
		for (size_t i = 0; i < sizeof(input); i++) {
			state = state * 6364136223846793005ull + 1442695040888963407ull;
			input[i] = (uint8_t)(state >> 56);
			if ((state >> 40) % 3) /* near-valid entries get further than noise */
				input[i] &= 1;
		}
		for (size_t e = 0; e < 8; e++) {
			struct tfd_entry *entry = (void *)(input + sizeof(uint64_t) + e * sizeof(*entry));

			if ((state >> (e * 5)) % 8 == 0)
				continue;
			entry->op = (uint8_t)(1 + (state >> (e * 3)) % 4);
			entry->flags = entry->_resv0 = 0;
			entry->record = (uint32_t)((run * 8 + (long)e) % 64);
			entry->job_id = (uint64_t)run * 8 + e + 1;
			entry->dst_grant = grant;
			entry->src_region = user.region;
			entry->_resv1 = 0;
			memset(entry->_resv2, 0, sizeof(entry->_resv2));
			entry->deadline_ns = 0;
		}
		(void)LLVMFuzzerTestOneInput(input, sizeof(input));
	}
	user_close(&user);
	user_close(&target);
	tfd_core_close(host.core);
	(void)printf("%ld inputs\n", runs);
	return 0;
}
#endif
