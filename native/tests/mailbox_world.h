/* SPDX-License-Identifier: Apache-2.0 */
/* The world of test_core_mailbox: senders and a mailbox on two hosts, or on one. */
#ifndef MAILBOX_WORLD_H
#define MAILBOX_WORLD_H

#include "mailbox_fixture.h"

#define PATHS 2
#define SLOTS 4
#define BYTES 1024

struct world {
	struct host hosts[2];
	struct host *a, *b; /* the same one, within one daemon */
	struct user from, other, to;
	uint64_t out[PATHS], in[PATHS];
	struct box box;
	uint64_t open;
};

static void host_open_local(struct host *host)
{
	struct tfd_core_options core = { .spin_us = 50, .max_sessions = 16 };
	struct tfd_group_options group = { .provider = "local", .rails = { "local" }, .rail_count = 1 };

	CHECK_OK(tfd_core_open(&core, &host->core, &error));
	CHECK_OK(tfd_group_open(host->core, &group, &host->group, &error));
}

static void world_open(struct world *w, bool local)
{
	memset(w, 0, sizeof(*w));
	w->a = w->b = &w->hosts[0];
	if (local) {
		host_open_local(w->a);
	} else {
		w->b = &w->hosts[1];
		host_open(w->a);
		host_open(w->b);
	}
	user_open(w->a, &w->from);
	user_open(w->a, &w->other);
	user_open(w->b, &w->to);
	for (uint32_t i = 0; i < PATHS; i++)
		connect_hosts(w->a, w->b, &w->out[i], &w->in[i]);
	box_open(&w->box, &w->to, 4096, SLOTS, BYTES);
	w->open = open_box(&w->from, &w->box, w->out, PATHS);
	for (uint32_t i = 0; i < 65536; i++)
		arena_of(&w->from)[i] = (uint8_t)(i * 2654435761u >> 11);
	memcpy(arena_of(&w->other), arena_of(&w->from), 65536);
}

static void world_close(struct world *w)
{
	user_close(&w->from);
	user_close(&w->other);
	user_close(&w->to);
	tfd_core_close(w->a->core);
	if (w->b != w->a)
		tfd_core_close(w->b->core);
}

static void expect(const struct tfd_record *record, uint32_t status, uint32_t detail)
{
	if (record->status != status || record->detail != detail) {
		(void)fprintf(stderr, "status %u detail %u\n", record->status, record->detail);
		exit(1);
	}
}

static void release(const struct box *box, const struct tfd_letter *letter)
{
	expect(user_run(box->user, release_entry(box, letter->slot, letter->number)), TFD_JOB_OK, 0);
}

#endif
