/* SPDX-License-Identifier: Apache-2.0 */
/* Mailboxes between two cores on loopback, and within one over the local provider: delivered, full, refused, cut off, hostile. */
#include "core/parts.h"
#include "mailbox_world.h"

#include <time.h>

static void test_lengths(struct world *w)
{
	static const uint32_t lengths[] = { 0, 1, 63, 64, 1023, BYTES };

	for (uint32_t i = 0; i < 48; i++) {
		uint32_t bytes = lengths[i % 6];
		struct tfd_record *record = user_run(&w->from, send_entry(w->open, 8 * i, bytes));
		struct tfd_letter letter;
		const uint8_t *message;

		expect(record, TFD_JOB_OK, 0);
		CHECK(record->bytes == bytes && record->path >> TFD_PATH_RAILS_SHIFT == 1);
		message = box_await(&w->box, &letter); /* OK means that it is there */
		CHECK(letter.bytes == bytes && memcmp(message, arena_of(&w->from) + 8 * i, bytes) == 0);
		CHECK(box_value(&w->box) == w->box.seen);
		release(&w->box, &letter);
	}
}

/* A full mailbox keeps the others waiting; each slot that is released lets one in. */
static void test_full(struct world *w)
{
	enum { JOBS = 30 };
	struct tfd_record *records[JOBS];
	uint64_t ids[JOBS];
	bool seen[JOBS] = { false };
	uint32_t ended = 0;

	for (uint32_t i = 0; i < JOBS; i++) {
		records[i] = user_submit(&w->from, send_entry(w->open, 64 * i, 64));
		ids[i] = w->from.next_job;
	}
	for (uint32_t taken = 0; taken < JOBS; taken++) {
		struct tfd_letter letter;
		const uint8_t *message = box_await(&w->box, &letter);
		uint32_t which = 0;

		CHECK(box_value(&w->box) - (w->box.seen - 1) <= SLOTS);
		while (which < JOBS && memcmp(message, arena_of(&w->from) + 64 * which, 64) != 0)
			which++;
		CHECK(which < JOBS && !seen[which]);
		seen[which] = true;
		wait_done(records[which], ids[which]);
		expect(records[which], TFD_JOB_OK, 0);
		ended = 0;
		for (uint32_t i = 0; i < JOBS; i++)
			ended += tfd_load_acquire(&records[i]->done_id) == ids[i];
		CHECK(ended <= taken + SLOTS);
		release(&w->box, &letter);
	}
	for (uint32_t i = 0; i < JOBS; i++) {
		wait_done(records[i], ids[i]);
		expect(records[i], TFD_JOB_OK, 0);
	}
	CHECK(box_value(&w->box) == w->box.seen);
}

/* Fills it: slots are held until drain(). */
static void fill(struct world *w)
{
	for (uint32_t i = 0; i < SLOTS; i++)
		expect(user_run(&w->from, send_entry(w->open, 0, 8)), TFD_JOB_OK, 0);
}

static void drain(struct world *w, uint32_t count)
{
	while (count--) {
		struct tfd_letter letter;

		(void)box_await(&w->box, &letter);
		release(&w->box, &letter);
	}
}

/* One that gave up waiting does not take the turn of who waits behind it. */
static void test_waiters(struct world *w)
{
	uint64_t second = open_box(&w->other, &w->box, &w->out[1], 1);
	struct tfd_entry entry = send_entry(w->open, 0, 8);
	struct tfd_record *cancelled, *late, *waiting;
	uint64_t cancelled_id;

	fill(w);
	cancelled = user_submit(&w->from, entry);
	cancelled_id = w->from.next_job;
	entry.deadline_ns = 1;
	expect(user_run(&w->from, entry), TFD_JOB_DEADLINE, 0);
	for (uint32_t i = 0; i < 4; i++) { /* parked behind, so asked before the other does */
		struct timespec now;

		(void)clock_gettime(CLOCK_MONOTONIC, &now);
		entry.deadline_ns = (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec + 3000000u;
		late = user_run(&w->from, entry);
		expect(late, TFD_JOB_DEADLINE, 0);
	}
	waiting = user_submit(&w->other, send_entry(second, 64, 100));
	expect(user_run(&w->from, (struct tfd_entry){ .op = TFD_OP_CANCEL, .argument = cancelled_id }),
	       TFD_JOB_OK, 0);
	wait_done(cancelled, cancelled_id);
	expect(cancelled, TFD_JOB_CANCELLED, 0);
	CHECK(tfd_load_acquire(&waiting->done_id) != w->other.next_job);
	drain(w, 1);
	wait_done(waiting, w->other.next_job);
	expect(waiting, TFD_JOB_OK, 0);
	drain(w, SLOTS);
	CHECK_OK(tfd_open_revoke(w->a->core, w->other.session, second, TFD_DETAIL_REVOKED));
	(void)wait_event(w->a, TFD_EVENT_OPEN_QUIET, second);
	CHECK_OK(tfd_open_remove(w->a->core, w->other.session, second));
}

static void test_revoked(struct world *w)
{
	uint64_t open = open_box(&w->other, &w->box, w->out, PATHS);
	struct tfd_record *records[20];
	uint64_t first = w->other.next_job + 1;

	fill(w);
	for (uint32_t i = 0; i < 20; i++)
		records[i] = user_submit(&w->other, send_entry(open, 0, 8));
	while (tfd_load_acquire(&w->other.ring->head) != w->other.ring->tail)
		(void)usleep(100);
	CHECK_OK(tfd_open_revoke(w->a->core, w->other.session, open, TFD_DETAIL_REVOKED));
	(void)wait_event(w->a, TFD_EVENT_OPEN_QUIET, open);
	for (uint32_t i = 0; i < 20; i++) {
		wait_done(records[i], first + i);
		expect(records[i], TFD_JOB_CANCELLED, TFD_DETAIL_REVOKED);
	}
	CHECK_OK(tfd_open_remove(w->a->core, w->other.session, open));
	drain(w, SLOTS);
}

static void test_bad_requests(struct world *w)
{
	uint64_t writes = open_grant(&w->from, &w->to, w->out[0]);
	struct tfd_entry entry = send_entry(w->open, 0, BYTES + 1);

	expect(user_run(&w->from, entry), TFD_JOB_INVALID, TFD_DETAIL_DESTINATION_BOUNDS);
	entry = send_entry(w->open, 4, 8);
	expect(user_run(&w->from, entry), TFD_JOB_INVALID, TFD_DETAIL_TABLE);
	entry = send_entry(w->open, w->from.header->arena_bytes, 8);
	expect(user_run(&w->from, entry), TFD_JOB_INVALID, TFD_DETAIL_TABLE);
	entry = send_entry(w->open, 0, 8);
	entry.length = 8;
	expect(user_run(&w->from, entry), TFD_JOB_INVALID, TFD_DETAIL_BAD_FLAGS);
	expect(user_run(&w->from, send_entry(writes, 0, 8)), TFD_JOB_INVALID, TFD_DETAIL_RIGHTS);
	entry = (struct tfd_entry){ .op = TFD_OP_WRITE, .dst_grant = w->open, .src_region = w->from.region };
	expect(user_run(&w->from, entry), TFD_JOB_INVALID, TFD_DETAIL_RIGHTS);
	CHECK(box_value(&w->box) == w->box.seen);
}

static void test_bad_releases(struct world *w)
{
	struct tfd_letter letter;
	struct tfd_entry good, bad;

	expect(user_run(&w->from, send_entry(w->open, 0, 8)), TFD_JOB_OK, 0);
	(void)box_await(&w->box, &letter);
	good = release_entry(&w->box, letter.slot, letter.number);
	bad = good;
	bad.argument++; /* another message */
	expect(user_run(&w->to, bad), TFD_JOB_INVALID, TFD_DETAIL_BAD_MAILBOX);
	for (uint32_t i = 0; i < 3; i++) {
		static const uint64_t slots[] = { SLOTS, 1ull << 32, UINT64_MAX };

		bad = good;
		bad.src_offset = slots[i];
		expect(user_run(&w->to, bad), TFD_JOB_INVALID, TFD_DETAIL_BAD_MAILBOX);
	}
	bad = good;
	bad.src_offset = (letter.slot + 1) % SLOTS; /* holds none */
	expect(user_run(&w->to, bad), TFD_JOB_INVALID, TFD_DETAIL_BAD_MAILBOX);
	bad = good;
	bad.dst_grant ^= 1ull << 33;
	expect(user_run(&w->to, bad), TFD_JOB_INVALID, TFD_DETAIL_BAD_MAILBOX);
	expect(user_run(&w->other, good), TFD_JOB_INVALID, TFD_DETAIL_BAD_MAILBOX); /* not its own */
	expect(user_run(&w->to, good), TFD_JOB_OK, 0);
	expect(user_run(&w->to, good), TFD_JOB_INVALID, TFD_DETAIL_BAD_MAILBOX); /* twice */
}

static void test_bad_options(struct world *w)
{
	struct tfd_mailbox_options good = { .region = w->to.region, .slots = 2, .slot_bytes = 64 };
	struct tfd_mailbox_options bad[8];
	struct tfd_mailbox_info info;

	for (uint32_t i = 0; i < 8; i++)
		bad[i] = good;
	bad[0].slots = 0;
	bad[1].slots = TFD_MAILBOX_SLOTS_MAX + 1;
	bad[2].slot_bytes = 0;
	bad[3].slot_bytes = TFD_MESSAGE_BYTES_MAX + 1;
	bad[4].offset = 8;
	bad[5].offset = REGION_BYTES;
	bad[6].offset = UINT64_MAX & ~63ull;
	bad[7].slots = REGION_BYTES / 64;
	for (uint32_t i = 0; i < 8; i++)
		CHECK(tfd_mailbox_add(w->b->core, w->to.session, &bad[i], &info, &error) == -EINVAL);
	good.region ^= 1ull << 40;
	CHECK(tfd_mailbox_add(w->b->core, w->to.session, &good, &info, &error) == -ENOENT);
	CHECK(tfd_region_remove(w->b->core, w->to.session, w->to.region) == -EBUSY);
	CHECK(tfd_mailbox_remove(w->a->core, w->other.session, w->box.info.mailbox) == -ENOENT);
}

/* What a session's mailboxes take of the daemon's own memory has a bound, whatever little of its own they lie in. */
static void test_slots(struct world *w)
{
	struct tfd_mailbox_options options = { .region = w->to.region,
	                                       .slots = TFD_MAILBOX_SLOTS_MAX,
	                                       .slot_bytes = 1 };
	struct tfd_mailbox_info boxes[16];
	uint32_t count = 0;
	int rc = 0;

	while (!rc && count < 16) {
		rc = tfd_mailbox_add(w->b->core, w->to.session, &options, &boxes[count], &error);
		count += !rc;
	}
	CHECK(rc == -EDQUOT && count * TFD_MAILBOX_SLOTS_MAX + SLOTS <= TFD_SESSION_SLOTS);
	CHECK_OK(tfd_mailbox_remove(w->b->core, w->to.session, boxes[0].mailbox));
	CHECK_OK(tfd_mailbox_add(w->b->core, w->to.session, &options, &boxes[0], &error));
	while (count--)
		CHECK_OK(tfd_mailbox_remove(w->b->core, w->to.session, boxes[count].mailbox));
}

/* Counters of closed mailboxes are used again, and go on from where they stood. */
static void test_counters(struct world *w)
{
	uint32_t counter = UINT32_MAX;

	for (uint32_t i = 0; i < 200; i++) {
		struct tfd_letter letter;
		struct box box;
		uint64_t open;

		box_open(&box, &w->to, 1u << 20, 1, 64);
		CHECK(counter == UINT32_MAX || box.info.counter == counter);
		counter = box.info.counter;
		CHECK(box.info.first == i && box_value(&box) == i);
		open = open_box(&w->from, &box, w->out, 1);
		expect(user_run(&w->from, send_entry(open, i * 8, 8)), TFD_JOB_OK, 0);
		CHECK(memcmp(box_await(&box, &letter), arena_of(&w->from) + i * 8, 8) == 0);
		CHECK(w->to.counters[counter].faults == w->to.counters[counter].acknowledged);
		box_close(&box);
		CHECK(w->to.counters[counter].faults == i + 1 && w->to.counters[counter].acknowledged == i);
		expect(user_run(&w->from, send_entry(open, 0, 8)), TFD_JOB_REMOTE_ACCESS, TFD_DETAIL_REVOKED);
		CHECK_OK(tfd_open_revoke(w->a->core, w->from.session, open, 0));
		CHECK_OK(tfd_open_remove(w->a->core, w->from.session, open));
	}
}

static void test_take(struct world *w)
{
	uint8_t buffer[BYTES];
	size_t bytes = sizeof(buffer);
	uint64_t box = w->box.info.mailbox;
	struct tfd_letter letter;

	CHECK(tfd_mailbox_take(w->b->core, w->to.session, box, buffer, &bytes) == -EAGAIN);
	for (uint32_t i = 0; i < 3 * SLOTS; i++) {
		expect(user_run(&w->from, send_entry(w->open, 8 * i, 100 + i)), TFD_JOB_OK, 0);
		bytes = 99;
		CHECK(tfd_mailbox_take(w->b->core, w->to.session, box, buffer, &bytes) == -EMSGSIZE);
		bytes = sizeof(buffer);
		CHECK_OK(tfd_mailbox_take(w->b->core, w->to.session, box, buffer, &bytes));
		CHECK(bytes == 100 + i && memcmp(buffer, arena_of(&w->from) + 8 * i, bytes) == 0);
		(void)box_next(&w->box, &letter);
	}
	CHECK(tfd_mailbox_take(w->a->core, w->other.session, box, buffer, &bytes) == -ENOENT);
}

/* Jobs first .. first + count - 1 that have ended. */
static uint32_t ended(struct tfd_record *const *records, uint64_t first, uint32_t count)
{
	uint32_t done = 0;

	for (uint32_t i = 0; i < count; i++)
		done += tfd_load_acquire(&records[i]->done_id) == first + i;
	return done;
}

static void await_end(struct world *w, uint64_t job)
{
	struct tfd_job_end end;
	int rc;

	while ((rc = tfd_job_result(w->a->core, w->from.session, job, &end)) == -EAGAIN)
		(void)usleep(100);
	CHECK_OK(rc);
	CHECK(end.status == TFD_JOB_OK);
}

/* What jobs of control refer to is the daemon's memory while they wait: a session has a bounded share of it. */
static void test_control_tables(struct world *w)
{
	enum { ROOM = TFD_CONTROL_TABLES / (1 << 20) };
	uint8_t *tables = calloc(ROOM + 1, 1 << 20);
	struct tfd_entry entry = send_entry(w->open, 0, 8);
	uint64_t jobs[ROOM + 1];

	CHECK(tables);
	fill(w);
	for (uint32_t i = 0; i < ROOM; i++) {
		CHECK_OK(tfd_jobs_submit(w->a->core, w->from.session, &entry, 1, tables, 1 << 20));
		jobs[i] = entry.job_id;
	}
	CHECK(tfd_jobs_submit(w->a->core, w->from.session, &entry, 1, tables, 8) == -EAGAIN);
	CHECK_OK(tfd_jobs_submit(w->a->core, w->other.session, &entry, 1, tables, 8));
	drain(w, SLOTS + ROOM);
	for (uint32_t i = 0; i < ROOM; i++)
		await_end(w, jobs[i]);
	/* However long its tables, one submit has room when nothing else is in flight. */
	CHECK_OK(tfd_jobs_submit(w->a->core, w->from.session, &entry, 1, tables, (ROOM + 1) << 20));
	drain(w, 1);
	await_end(w, entry.job_id);
	free(tables);
}

static void path_close(struct world *w, uint32_t path)
{
	struct tfd_landed landed;

	CHECK_OK(tfd_conn_close(w->b->core, w->in[path], TFD_DETAIL_CONNECTION, NULL, &landed));
	CHECK_OK(tfd_conn_close(w->a->core, w->out[path], TFD_DETAIL_CONNECTION, &landed, NULL));
}

static int count_calls(struct tfd_worker *worker, void *argument)
{
	uint32_t *count = argument;

	for (struct tfd_list *link = worker->conns.next; link != &worker->conns; link = link->next)
		*count += tfd_container(link, struct tfd_conn, link)->channel->calls_open;
	return 0;
}

/* Until no message is under way: those that have not been delivered wait for a slot. */
static void await_parked(const struct world *w)
{
	uint32_t calls = 1;

	for (int i = 0; i < 50000 && calls; i++) {
		calls = 0;
		CHECK_OK(tfd_command_run(w->a->core->groups[0]->worker, count_calls, &calls));
	}
	CHECK(!calls);
}

/* With one path gone, messages go by the other, those that wait as well; with none left they are lost. */
static void test_paths_lost(struct world *w)
{
	enum { JOBS = SLOTS + 2 };
	struct tfd_record *records[JOBS];
	uint64_t first;
	uint32_t lost = 0;

	fill(w);
	first = w->from.next_job + 1;
	for (uint32_t i = 0; i < JOBS; i++)
		records[i] = user_submit(&w->from, send_entry(w->open, 0, 8));
	while (tfd_load_acquire(&w->from.ring->head) != w->from.ring->tail)
		(void)usleep(100);
	await_parked(w); /* what is under way may have landed, and is lost then */
	CHECK(ended(records, first, JOBS) == 0);
	path_close(w, 0);
	drain(w, SLOTS);
	for (int i = 0; i < 50000 && ended(records, first, JOBS) < SLOTS; i++)
		(void)usleep(100);
	CHECK(ended(records, first, JOBS) == SLOTS);
	await_parked(w);
	path_close(w, 1);
	for (uint32_t i = 0; i < JOBS; i++) {
		wait_done(records[i], first + i);
		lost += records[i]->status == TFD_JOB_PEER_LOST;
		if (records[i]->status != TFD_JOB_PEER_LOST)
			expect(records[i], TFD_JOB_OK, 0);
	}
	CHECK(lost == JOBS - SLOTS);
	for (uint32_t i = 0; i < PATHS; i++)
		connect_hosts(w->a, w->b, &w->out[i], &w->in[i]);
	w->open = open_box(&w->from, &w->box, w->out, PATHS);
	drain(w, SLOTS);
	CHECK(box_value(&w->box) == w->box.seen);
}

/* An end of the sender's session while its messages wait leaves nothing behind; another's gets the slot. */
static void test_sender_ends(struct world *w)
{
	uint64_t open = open_box(&w->other, &w->box, w->out, PATHS);
	struct tfd_record *waiting;

	fill(w);
	for (uint32_t i = 0; i < 20; i++)
		(void)user_submit(&w->other, send_entry(open, 0, 8));
	user_close(&w->other);
	user_open(w->a, &w->other);
	waiting = user_submit(&w->from, send_entry(w->open, 0, 16));
	drain(w, SLOTS);
	wait_done(waiting, w->from.next_job);
	expect(waiting, TFD_JOB_OK, 0);
	drain(w, 1);
}

/* The owner takes its memory away: its mailbox refuses, and nobody else notices. */
static void test_memory_taken(struct world *w)
{
	struct tfd_region_options options = { .writable = 1, .length = 65536 };
	struct tfd_mailbox_options place = { .slots = 4, .slot_bytes = 4096 };
	struct tfd_mailbox_info info;
	struct box box = { .user = &w->to, .slot_bytes = 4096 };
	uint64_t open;

	options.fd = memfd_create("taken", MFD_CLOEXEC);
	CHECK(options.fd >= 0 && ftruncate(options.fd, 65536) == 0);
	CHECK_OK(tfd_region_add(w->b->core, w->to.session, &options, &place.region, &error));
	CHECK_OK(tfd_mailbox_add(w->b->core, w->to.session, &place, &info, &error));
	box.info = info;
	open = open_box(&w->from, &box, w->out, PATHS);
	expect(user_run(&w->from, send_entry(open, 0, 1000)), TFD_JOB_OK, 0);
	CHECK(ftruncate(options.fd, 0) == 0);
	(void)close(options.fd);
	for (uint32_t i = 0; i < 4; i++)
		expect(user_run(&w->from, send_entry(open, 0, 1000)), TFD_JOB_REMOTE_ACCESS,
		       TFD_DETAIL_BROKEN_REGION);
	(void)wait_event(w->b, TFD_EVENT_REGION_BROKEN, place.region);
	CHECK_OK(tfd_mailbox_remove(w->b->core, w->to.session, info.mailbox));
	CHECK_OK(tfd_region_remove(w->b->core, w->to.session, place.region));
	test_lengths(w);
}

static int count_free_wrs(struct tfd_worker *worker, void *argument)
{
	uint32_t *count = argument;

	for (struct tfd_wr *wr = worker->wr_free; wr; wr = wr->next)
		++*count;
	return 0;
}

/* Connections close with messages under way, either end first: each job ends, and all work requests are used again. */
static void test_closed_in_flight(struct world *w)
{
	enum { ROUNDS = 60, JOBS = 20 };

	for (uint32_t i = 0; i < PATHS; i++)
		path_close(w, i);
	for (uint32_t round = 0; round < ROUNDS; round++) {
		struct tfd_record *records[JOBS];
		uint64_t first = w->from.next_job + 1;
		struct tfd_landed landed = { 0 };
		uint64_t out, in, open;
		uint8_t buffer[BYTES];
		size_t bytes = sizeof(buffer);

		connect_hosts(w->a, w->b, &out, &in);
		open = open_box(&w->from, &w->box, &out, 1);
		for (uint32_t i = 0; i < JOBS; i++)
			records[i] = user_submit(&w->from, send_entry(open, 64 * i, BYTES));
		(void)usleep(50 * (round % 8));
		if (round % 2)
			CHECK_OK(tfd_conn_close(w->b->core, in, 0, NULL, &landed));
		CHECK_OK(tfd_conn_close(w->a->core, out, TFD_DETAIL_CONNECTION, &landed, NULL));
		if (!(round % 2))
			CHECK_OK(tfd_conn_close(w->b->core, in, 0, NULL, NULL));
		for (uint32_t i = 0; i < JOBS; i++) {
			wait_done(records[i], first + i);
			CHECK(records[i]->status == TFD_JOB_OK || records[i]->status == TFD_JOB_PEER_LOST);
		}
		CHECK_OK(tfd_open_revoke(w->a->core, w->from.session, open, 0));
		CHECK_OK(tfd_open_remove(w->a->core, w->from.session, open));
		while (!tfd_mailbox_take(w->b->core, w->to.session, w->box.info.mailbox, buffer, &bytes))
			bytes = sizeof(buffer);
	}
	for (uint32_t i = 0; i < 2; i++) {
		struct host *host = i ? w->b : w->a;
		uint32_t count = 0;

		CHECK_OK(tfd_command_run(host->core->groups[0]->worker, count_free_wrs, &count));
		CHECK(count == TFD_WRS_PER_WORKER);
	}
	for (uint32_t i = 0; i < PATHS; i++)
		connect_hosts(w->a, w->b, &w->out[i], &w->in[i]);
	w->open = open_box(&w->from, &w->box, w->out, PATHS);
	w->box.seen = box_value(&w->box);
}

/* Its receiver's session ends with messages in it, and senders that wait: their open's revoke is what tells them. */
static void test_receiver_ends(struct world *w)
{
	fill(w);
	(void)user_submit(&w->from, send_entry(w->open, 0, 8));
	CHECK_OK(tfd_session_end(w->b->core, w->to.session, TFD_DETAIL_SESSION_ENDED));
	(void)wait_event(w->b, TFD_EVENT_SESSION_QUIET, w->to.session);
	CHECK_OK(tfd_open_revoke(w->a->core, w->from.session, w->open, TFD_DETAIL_REVOKED));
	(void)wait_event(w->a, TFD_EVENT_OPEN_QUIET, w->open);
	user_free(&w->to);
	user_open(w->b, &w->to);
}

/* Bytes of an address that cannot be a half's are refused; messages of nobody are dropped. */
static void test_bad_address(struct world *w)
{
	uint8_t address[TFD_ADDRESS_MAX] = { 0 };
	size_t bytes = sizeof(address);
	uint64_t conn;

	CHECK_OK(tfd_conn_open(w->a->core, w->a->group, 0, 1, 1, &conn, address, &bytes, &error));
	address[bytes - 40] ^= 1;
	CHECK(tfd_conn_start(w->a->core, conn, address, bytes, &error) == -EPROTO);
	CHECK(tfd_conn_start(w->a->core, conn, address, 8, &error) == -EPROTO);
	CHECK(tfd_conn_start(w->a->core, conn, address, 0, &error) == -EPROTO);
	CHECK_OK(tfd_conn_close(w->a->core, conn, 0, NULL, NULL));
}

int main(void)
{
	for (int local = 0; local < 2; local++) {
		struct world w;

		world_open(&w, local);
		test_lengths(&w);
		test_full(&w);
		test_waiters(&w);
		test_revoked(&w);
		test_bad_requests(&w);
		test_bad_releases(&w);
		test_bad_options(&w);
		test_counters(&w);
		test_control_tables(&w);
		test_slots(&w);
		test_paths_lost(&w);
		test_sender_ends(&w);
		test_bad_address(&w);
		test_take(&w);
		test_closed_in_flight(&w);
		test_memory_taken(&w);
		test_receiver_ends(&w);
		world_close(&w);
	}
	return 0;
}
