/* SPDX-License-Identifier: Apache-2.0 */
/* Plans of jobs that their client copies, launched one after the other and by triggers, with tables that are read when the word comes; and reads. */
#include "copied_world.h"

#define TABLE_AT 65536u /* of the arena */
#define PAGE 64u
#define CAPACITY 600u /* pages: more than one batch */

static struct tfd_plan_table *head_of(struct world *w)
{
	return (void *)(arena_of(w) + TABLE_AT);
}

static struct tfd_page *pages_of(struct world *w)
{
	return (void *)(head_of(w) + 1);
}

static struct tfd_slice *slices_of(struct world *w)
{
	return (void *)(head_of(w) + 1);
}

static void make(struct world *w, uint32_t number, struct tfd_entry entry, uint32_t detail)
{
	struct running running;

	entry.plan = number;
	entry.flags |= TFD_FLAG_PLAN | TFD_FLAG_COPIED;
	running = submit(w, entry);
	ends(w, &running, detail ? TFD_JOB_INVALID : TFD_JOB_OK, detail);
}

static void forget(struct world *w, uint32_t number)
{
	struct running running = submit(w, (struct tfd_entry){ .op = TFD_OP_FORGET, .argument = number });

	ends(w, &running, TFD_JOB_OK, 0);
}

static struct tfd_entry write_entry(const struct world *w)
{
	return (struct tfd_entry){ .op = TFD_OP_WRITE,
	                           .src_region = w->from.device,
	                           .dst_grant = w->on_device[0],
	                           .length = 4096,
	                           .imm = 1 };
}

static struct tfd_entry with_table(struct tfd_entry entry)
{
	entry.flags |= TFD_FLAG_TABLE;
	entry.argument = TABLE_AT;
	return entry;
}

static struct tfd_entry launch_entry(uint32_t number, uint64_t fire_at)
{
	return (struct tfd_entry){
		.op = TFD_OP_LAUNCH, .flags = COPIED_FLAGS, .plan = number, .fire_at = fire_at
	};
}

static struct running launch(struct world *w, uint32_t number)
{
	struct running running;

	drop_events(w);
	bump_to(w, 0);
	running = submit(w, launch_entry(number, 1));
	step(w, 4);
	CHECK(!over(&running));
	return running;
}

/* Its stream waits for watcher 1 to reach 5; the marks are in the place of watcher 2. */
static struct running launch_triggered(struct world *w, uint32_t number)
{
	struct tfd_copy_marks *marks = (void *)&w->from.user.watchers[2];
	struct tfd_entry entry = launch_entry(number, 1);

	drop_events(w);
	bump_to(w, 0);
	tfd_store_seq(&w->from.user.watchers[1].value, 4);
	tfd_store_seq(&marks->marks[1], TFD_COPY_MARK(1));
	entry.trigger = 1;
	entry.marks = 3;
	entry.argument = 5;
	return submit(w, entry);
}

static bool is_void(const struct world *w)
{
	return ((const struct tfd_copy_marks *)(const void *)&w->from.user.watchers[2])->marks[1] ==
	       TFD_COPY_VOID(1);
}

static void test_a_write(struct world *w)
{
	uint64_t before = value_of(w, 0, 1);
	struct running running;

	make(w, 0, write_entry(w), 0);
	for (uint32_t i = 1; i < 4; i++) {
		running = launch(w, 0);
		CHECK(value_of(w, 0, 1) == before + i - 1);
		bump_to(w, 1);
		ends(w, &running, TFD_JOB_OK, 0);
		CHECK(value_of(w, 0, 1) == before + i && running.record->bytes == 4096);
		CHECK((running.record->path & TFD_PATH_PROVIDER_MASK) == TFD_PATH_CUDA);
	}
	rests(w);
}

/* Who copies is kept with the plan, and said by each launch. */
static void test_flags(struct world *w)
{
	struct tfd_entry imm = {
		.op = TFD_OP_IMM, .flags = TFD_FLAG_PLAN, .dst_grant = w->on_device[0], .plan = 1
	};
	struct tfd_entry entry = launch_entry(0, 0);
	struct running running = submit(w, imm);

	ends(w, &running, TFD_JOB_OK, 0);
	bump_to(w, 9);
	refused(w, launch_entry(1, 1), TFD_DETAIL_BAD_FLAGS);
	entry.flags = 0;
	refused(w, entry, TFD_DETAIL_BAD_FLAGS);
	entry.flags = TFD_FLAG_COPIED;
	refused(w, entry, TFD_DETAIL_BAD_FLAGS);
	entry.flags = TFD_FLAG_ARMED | TFD_FLAG_POLLED;
	refused(w, entry, TFD_DETAIL_BAD_FLAGS);
	entry = launch_entry(0, 1);
	entry.marks = 77;
	refused(w, entry, TFD_DETAIL_BAD_WATCHER);
	entry = write_entry(w);
	entry.marks = 1;
	make(w, 2, entry, TFD_DETAIL_BAD_FLAGS);
	entry = write_entry(w);
	entry.flags = TFD_FLAG_CHECKSUM;
	make(w, 2, entry, TFD_DETAIL_BAD_FLAGS);
	entry = write_entry(w);
	entry.dst_grant = w->on_host;
	make(w, 2, entry, TFD_DETAIL_NOT_COPIED);
	forget(w, 0);
	forget(w, 1);
}

static void test_a_write_with_a_table(struct world *w)
{
	struct tfd_slice *slice = slices_of(w);
	struct tfd_entry entry = with_table(write_entry(w));
	uint64_t before = value_of(w, 0, 1);
	struct running running;
	struct tfd_event event;

	entry.src_offset = 4096;
	entry.length = 8192; /* the window of its slices */
	make(w, 0, entry, 0);
	running = launch(w, 0);
	head_of(w)->count = 1; /* a kernel fills it before the stream copies */
	*slice = (struct tfd_slice){ .src_offset = 1000, .dst_offset = REGION_BYTES - 7000, .length = 7000 };
	bump_to(w, 1);
	ends(w, &running, TFD_JOB_OK, 0);
	CHECK(value_of(w, 0, 1) == ++before && running.record->bytes == 7000);
	running = launch(w, 0);
	head_of(w)->count = 0; /* nothing, and nothing is counted */
	bump_to(w, 1);
	ends(w, &running, TFD_JOB_OK, 0);
	CHECK(value_of(w, 0, 1) == before && running.record->bytes == 0);
	for (uint32_t i = 0; i < 3; i++) {
		running = launch(w, 0);
		head_of(w)->count = i == 2 ? 2 : 1;
		*slice = (struct tfd_slice){ .src_offset = i ? 0 : 8192,
		                             .dst_offset = i ? REGION_BYTES : 0,
		                             .length = 1 };
		bump_to(w, 1);
		ends(w, &running, TFD_JOB_INVALID,
		     (const uint32_t[]){ TFD_DETAIL_SOURCE_BOUNDS, TFD_DETAIL_DESTINATION_BOUNDS,
		                         TFD_DETAIL_TABLE }[i]);
		CHECK(next_event(w, TFD_EVENT_LOST, &event) && event.count == 1);
		CHECK(value_of(w, 0, 1) == before);
	}
	forget(w, 0);
	rests(w);
}

static void test_pages(struct world *w)
{
	struct tfd_entry entry = with_table(write_entry(w));
	uint64_t before = value_of(w, 0, 1);
	struct running running;

	entry.op = TFD_OP_WRITE_PAGES;
	entry.length = entry.src_stride = entry.dst_stride = PAGE;
	entry.table_count = CAPACITY;
	make(w, 0, entry, 0);
	for (uint32_t i = 0; i < CAPACITY; i++)
		pages_of(w)[i] = (struct tfd_page){ .src = i, .dst = CAPACITY - i };
	for (uint32_t i = 0; i < 3; i++) {
		const uint32_t count = (const uint32_t[]){ CAPACITY, 7, 0 }[i];

		running = launch(w, 0);
		head_of(w)->count = count;
		bump_to(w, 1);
		ends(w, &running, TFD_JOB_OK, 0);
		before += count;
		CHECK(value_of(w, 0, 1) == before && running.record->bytes == count * PAGE);
	}
	running = launch(w, 0);
	head_of(w)->count = 9;
	pages_of(w)[8].dst = REGION_BYTES / PAGE;
	bump_to(w, 1);
	ends(w, &running, TFD_JOB_INVALID, TFD_DETAIL_DESTINATION_BOUNDS);
	running = launch(w, 0); /* one that has not begun is lost without a number */
	CHECK_OK(tfd_open_fence(w->host.core, w->from.user.session, w->on_device[0],
	                        &(struct tfd_imm_range){ .first = 1, .count = 1 }, 1, 5));
	step(w, 5);
	CHECK(!over(&running));
	bump_to(w, 1);
	ends(w, &running, TFD_JOB_CANCELLED, TFD_DETAIL_FENCED);
	forget(w, 0);
	rests(w);
}

static struct tfd_entry scatter_entry(struct world *w)
{
	struct tfd_target *targets = (void *)arena_of(w);

	for (uint32_t i = 0; i < RECEIVERS; i++)
		targets[i] = (struct tfd_target){ .dst_grant = w->on_device[i], .length = 64 };
	return (struct tfd_entry){ .op = TFD_OP_SCATTER,
	                           .src_region = w->from.device,
	                           .length = 4096,
	                           .table_count = RECEIVERS,
	                           .imm = 3 };
}

static void test_a_scatter(struct world *w)
{
	struct tfd_slice *slices = slices_of(w);
	struct running running;

	make(w, 0, with_table(scatter_entry(w)), 0);
	memset(arena_of(w), 0xff, 4096); /* what it was made from is nobody's any more */
	running = launch(w, 0);
	for (uint32_t i = 0; i < RECEIVERS; i++)
		slices[i] = (struct tfd_slice){ .src_offset = 64 * i, .dst_offset = 128, .length = 32 };
	head_of(w)->count = 2;
	bump_to(w, 1);
	ends(w, &running, TFD_JOB_OK, 0);
	CHECK(value_of(w, 0, 3) == 1 && value_of(w, 1, 3) == 1 && value_of(w, 2, 3) == 0);
	CHECK(running.record->bytes == 64);
	/* Before its trigger comes, one of its targets is taken back: no stream could leave that out, so all of it ends. */
	head_of(w)->count = RECEIVERS;
	running = launch_triggered(w, 0);
	CHECK_OK(tfd_open_revoke(w->host.core, w->from.user.session, w->on_device[1], TFD_DETAIL_REVOKED));
	step(w, 2);
	CHECK(over(&running) && is_void(w) && running.record->status == TFD_JOB_CANCELLED);
	bump_to(w, 1);
	CHECK(value_of(w, 0, 3) == 1);
	rests(w);
	refused(w, launch_entry(0, 1), TFD_DETAIL_REVOKED);
	w->on_device[1] = grant_on(w, &w->to[1].user, w->to[1].device, 1, 0, 0);
	forget(w, 0);
}

static void test_triggers(struct world *w)
{
	uint64_t before = value_of(w, 0, 1);
	struct running running, cancel;

	make(w, 0, write_entry(w), 0);
	running = launch_triggered(w, 0);
	tfd_store_seq(&w->from.user.watchers[1].value, 5);
	step(w, 4);
	CHECK(!over(&running)); /* not before its stream is through */
	bump_to(w, 1);
	ends(w, &running, TFD_JOB_OK, 0);
	CHECK(value_of(w, 0, 1) == ++before);
	running = launch_triggered(w, 0);
	cancel = submit(w, (struct tfd_entry){ .op = TFD_OP_CANCEL, .argument = running.id });
	ends(w, &cancel, TFD_JOB_OK, 0);
	CHECK(over(&running) && is_void(w));
	forget(w, 0);
	rests(w);
}

static struct tfd_entry read_entry(const struct world *w, uint64_t grant)
{
	return (struct tfd_entry){ .op = TFD_OP_READ,
	                           .flags = COPIED_FLAGS,
	                           .src_region = w->from.device,
	                           .src_offset = 64,
	                           .dst_grant = grant,
	                           .dst_offset = 128,
	                           .length = 4096,
	                           .fire_at = 1 };
}

static void reads(struct world *w, struct tfd_entry entry)
{
	struct running running;
	struct tfd_event event;

	drop_events(w);
	bump_to(w, 0);
	running = submit(w, entry);
	step(w, 4);
	CHECK(!over(&running));
	bump_to(w, 1);
	ends(w, &running, TFD_JOB_OK, 0);
	CHECK(running.record->bytes == 4096 && running.record->path == TFD_PATH_CUDA);
	step(w, 2);
	CHECK(!tfd_core_events(w->host.core, &event, 1));
	rests(w);
}

static void test_reads(struct world *w)
{
	uint64_t only_map =
		grant_on(w, &w->to[0].user, w->to[0].device, 1, TFD_RIGHT_WRITE | TFD_RIGHT_MAP, 0);
	uint64_t only_read = grant_on(w, &w->to[0].user, w->to[0].device, 1, TFD_RIGHT_READ, 0);
	uint64_t read_only = device_region(&w->from.user, 0);
	struct tfd_entry entry = read_entry(w, w->on_device[0]);
	struct running running;
	struct tfd_event event;

	reads(w, entry);
	entry.flags = 0;
	entry.fire_at = 0;
	make(w, 0, entry, 0);
	reads(w, launch_entry(0, 1));
	forget(w, 0);
	refused(w, read_entry(w, only_map), TFD_DETAIL_RIGHTS);
	refused(w, read_entry(w, only_read), TFD_DETAIL_RIGHTS);
	entry = read_entry(w, w->on_device[0]);
	entry.dst_offset = REGION_BYTES - 1;
	refused(w, entry, TFD_DETAIL_DESTINATION_BOUNDS);
	entry = read_entry(w, w->on_device[0]);
	entry.src_region = read_only;
	refused(w, entry, TFD_DETAIL_READ_ONLY);
	/* Whoever takes the memory back waits for it as for a write. */
	drop_events(w);
	bump_to(w, 0);
	running = submit(w, read_entry(w, w->on_device[0]));
	CHECK_OK(tfd_open_revoke(w->host.core, w->from.user.session, w->on_device[0], TFD_DETAIL_REVOKED));
	step(w, 5);
	CHECK(!over(&running) && !next_event(w, TFD_EVENT_OPEN_QUIET, &event));
	bump_to(w, 1);
	ends(w, &running, TFD_JOB_CANCELLED, TFD_DETAIL_REVOKED);
	CHECK(running.record->bytes == 0 && next_event(w, TFD_EVENT_OPEN_QUIET, &event));
	rests(w);
}

int main(void)
{
	struct world w;

	world_open(&w);
	test_a_write(&w);
	test_flags(&w);
	test_a_write_with_a_table(&w);
	test_pages(&w);
	test_a_scatter(&w);
	test_triggers(&w);
	test_reads(&w);
	world_close(&w);
	return 0;
}
