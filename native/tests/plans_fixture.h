/* SPDX-License-Identifier: Apache-2.0 */
/* What tests of plans share. For C tests. */
#ifndef TFD_PLANS_FIXTURE_H
#define TFD_PLANS_FIXTURE_H

#include "sim_pair.h"

#define SLICE 4096u
#define TABLE_AT 65536u /* of the arena: where plans have their tables */
#define TARGETS 5u

struct launched {
	const struct tfd_record *record;
	uint64_t id;
};

static inline struct tfd_plan_table *head_of(const struct sim_pair *pair)
{
	return (void *)((uint8_t *)sim_table(&pair->from) + TABLE_AT);
}

static inline struct tfd_slice *slices_of(const struct sim_pair *pair)
{
	return (void *)(head_of(pair) + 1);
}

static inline struct tfd_page *pages_of(const struct sim_pair *pair)
{
	return (void *)(head_of(pair) + 1);
}

static inline struct tfd_entry entry_of(const struct sim_pair *pair, uint8_t op, uint32_t imm)
{
	struct tfd_entry entry = { .op = op, .imm = imm };

	if (op == TFD_OP_WRITE || op == TFD_OP_SCATTER || op == TFD_OP_WRITE_PAGES || op == TFD_OP_READ)
		entry.src_region = pair->from.region;
	if (op != TFD_OP_SCATTER && op != TFD_OP_BARRIER)
		entry.dst_grant = pair->grant;
	return entry;
}

static inline const struct tfd_record *make(struct sim_pair *pair, uint32_t number, struct tfd_entry entry)
{
	entry.flags |= TFD_FLAG_PLAN;
	entry.plan = number;
	return sim_run(pair, &pair->from, entry);
}

static inline void make_ok(struct sim_pair *pair, uint32_t number, struct tfd_entry entry)
{
	expect(make(pair, number, entry), TFD_JOB_OK, 0);
}

static inline struct launched launch(struct sim_pair *pair, uint32_t number)
{
	struct launched launched;

	launched.record = user_submit(&pair->from, (struct tfd_entry){ .op = TFD_OP_LAUNCH, .plan = number });
	launched.id = pair->from.next_job;
	return launched;
}

static inline struct launched launch_armed(struct sim_pair *pair, uint32_t number, uint64_t value)
{
	struct launched launched;

	launched.record = user_submit(&pair->from, (struct tfd_entry){ .op = TFD_OP_LAUNCH,
	                                                               .plan = number,
	                                                               .flags = TFD_FLAG_ARMED,
	                                                               .fire_at = value });
	launched.id = pair->from.next_job;
	sim_step(pair, 1);
	return launched;
}

static inline void bump_to(struct sim_pair *pair, uint64_t value)
{
	tfd_store_release(&pair->from.watchers[0].value, value);
	sim_step(pair, 1);
}

static inline void ends(struct sim_pair *pair, struct launched launched, uint32_t status, uint32_t detail)
{
	sim_await(pair, launched.record, launched.id);
	expect(launched.record, status, detail);
}

static inline void runs(struct sim_pair *pair, uint32_t number, uint32_t status, uint32_t detail)
{
	ends(pair, launch(pair, number), status, detail);
}

static inline void forget(struct sim_pair *pair, uint32_t number)
{
	expect(sim_run(pair, &pair->from, (struct tfd_entry){ .op = TFD_OP_FORGET, .argument = number }),
	       TFD_JOB_OK, 0);
}

static inline uint64_t value_of(const struct sim_pair *pair, uint32_t imm)
{
	return tfd_load_acquire(&pair->to.counters[imm].value);
}

static inline const struct tfd_session *session_of(const struct sim_pair *pair)
{
	return tfd_table_get(&pair->a.core->sessions, pair->from.session);
}

static inline void clear(struct sim_pair *pair)
{
	memset(pair->to.memory, 0, 64 * SLICE);
}

static inline bool landed(const struct sim_pair *pair, uint64_t src, uint64_t dst, uint64_t length)
{
	return memcmp(pair->to.memory + dst, pair->from.memory + src, length) == 0;
}

static inline bool nothing_landed(const struct sim_pair *pair)
{
	for (uint32_t i = 0; i < 64 * SLICE; i++) {
		if (pair->to.memory[i])
			return false;
	}
	return true;
}

static inline void drop_events(struct sim_pair *pair)
{
	while (tfd_core_events(pair->a.core, &(struct tfd_event){ 0 }, 1))
		continue;
}

static inline void make_write(struct sim_pair *pair, uint32_t imm)
{
	struct tfd_entry entry = entry_of(pair, TFD_OP_WRITE, imm);

	entry.flags = TFD_FLAG_TABLE;
	entry.argument = TABLE_AT;
	entry.src_offset = SLICE; /* the window that slices count from */
	entry.length = 60 * SLICE;
	make_ok(pair, 0, entry);
}

#endif
