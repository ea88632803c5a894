/* SPDX-License-Identifier: Apache-2.0 */
/* A mailbox in a user's region, as its owner sees it. For C tests. */
#ifndef TFD_MAILBOX_FIXTURE_H
#define TFD_MAILBOX_FIXTURE_H

#include <stdbool.h>

#include "core_fixture.h"

struct box {
	struct user *user;
	struct tfd_mailbox_info info;
	uint32_t slots, slot_bytes;
	uint64_t offset;
	uint64_t seen; /* messages that were looked at */
};

static inline void box_open(struct box *box, struct user *user, uint64_t offset, uint32_t slots,
                            uint32_t slot_bytes)
{
	struct tfd_mailbox_options options = {
		.region = user->region, .offset = offset, .slots = slots, .slot_bytes = slot_bytes
	};

	*box = (struct box){ .user = user, .slots = slots, .slot_bytes = slot_bytes, .offset = offset };
	CHECK_OK(tfd_mailbox_add(user->host->core, user->session, &options, &box->info, &error));
	box->seen = box->info.first;
}

static inline void box_close(struct box *box)
{
	CHECK_OK(tfd_mailbox_remove(box->user->host->core, box->user->session, box->info.mailbox));
}

static inline uint64_t box_value(const struct box *box)
{
	return tfd_load_acquire(&box->user->counters[box->info.counter].value);
}

/* The next message, if there is one. */
static inline const uint8_t *box_next(struct box *box, struct tfd_letter *letter)
{
	const struct tfd_letter *letters = (void *)(box->user->memory + box->offset);

	if (box->seen == box_value(box))
		return NULL;
	*letter = letters[box->seen % box->slots];
	CHECK(letter->number == box->seen && letter->slot < box->slots && letter->bytes <= box->slot_bytes);
	box->seen++;
	return box->user->memory + box->offset + TFD_LETTERS_BYTES(box->slots) +
	       letter->slot * TFD_LINES((uint64_t)box->slot_bytes);
}

static inline const uint8_t *box_await(struct box *box, struct tfd_letter *letter)
{
	for (int i = 0; i < 50000; i++) {
		const uint8_t *message = box_next(box, letter);

		if (message)
			return message;
		(void)usleep(100);
	}
	(void)fprintf(stderr, "message %llu does not come\n", (unsigned long long)box->seen);
	exit(1);
}

static inline struct tfd_entry release_entry(const struct box *box, uint32_t slot, uint64_t number)
{
	return (struct tfd_entry){
		.op = TFD_OP_RELEASE, .dst_grant = box->info.mailbox, .src_offset = slot, .argument = number
	};
}

/* `from` may send to the box by these connections. */
static inline uint64_t open_box(struct user *from, const struct box *box, const uint64_t *conns,
                                uint32_t count)
{
	struct tfd_open_options options = { .path_count = count,
	                                    .rights = TFD_RIGHT_SEND,
	                                    .length = box->slot_bytes };
	uint64_t open;

	CHECK_OK(tfd_session_name_space(box->user->host->core, box->user->session, &options.name_space));
	for (uint32_t i = 0; i < count; i++)
		options.paths[i] = (struct tfd_open_path){ .conn = conns[i], .key = box->info.mailbox };
	CHECK_OK(tfd_open_add(from->host->core, from->session, &options, &open));
	return open;
}

/* Its bytes are at `at` of the arena. */
static inline struct tfd_entry send_entry(uint64_t open, uint64_t at, uint32_t bytes)
{
	return (struct tfd_entry){
		.op = TFD_OP_SEND, .dst_grant = open, .table_offset = at, .table_count = bytes
	};
}

static inline uint8_t *arena_of(const struct user *user)
{
	return user->segment + user->header->arena_offset;
}

#endif
