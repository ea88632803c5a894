/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Mailboxes: slots in memory of their owner's, that messages of all senders share. What the worker relies on (which slot is free, what it
 * holds) is private; letters and data in the region are written only.
 *
 * A sender that found no slot free is remembered, once, and told READY when one is: one sender for each slot, the longest waiting
 * first. One that does not use it (its job was cancelled, its connection closed) leaves a slot free while others wait: they are
 * told after MAILBOX_CHECK_NS.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "barrier.h"
#include "parts.h"

#define MAILBOX_CHECK_NS 10000000u

/* ---- who waits ---- */

static void mailbox_note(struct tfd_mailbox *mailbox)
{
	struct tfd_worker *worker = mailbox->session->group->worker;
	bool ready = mailbox->free_count && !tfd_list_empty(&mailbox->waiters);

	if (ready == !tfd_list_empty(&mailbox->ready_link))
		return;
	if (!ready) {
		tfd_list_remove(&mailbox->ready_link);
		return;
	}
	if (tfd_list_empty(&worker->mailboxes_ready))
		worker->next_mailbox_check_ns = worker->now_ns + MAILBOX_CHECK_NS;
	tfd_list_push(&worker->mailboxes_ready, &mailbox->ready_link);
}

void tfd_waiter_drop(struct tfd_waiter *waiter)
{
	struct tfd_worker *worker = waiter->conn->group->worker;
	struct tfd_mailbox *mailbox = waiter->mailbox;

	tfd_list_remove(&waiter->link);
	tfd_list_remove(&waiter->conn_link);
	tfd_list_remove(&waiter->hash_link);
	waiter->next_free = worker->waiter_free;
	worker->waiter_free = waiter;
	if (mailbox)
		mailbox_note(mailbox);
}

static struct tfd_list *bucket_of(const struct tfd_mailbox *mailbox, const struct tfd_conn *conn,
                                  uint32_t sender)
{
	uint64_t mixed = mailbox->handle ^ (uint64_t)conn->channel->number << 32 ^ sender;

	mixed *= 0x9e3779b97f4a7c15ull; /* the upper bits depend on all */
	return &conn->group->worker->waiters[(mixed >> 40) % TFD_WAITER_BUCKETS];
}

/* Not by the mailbox's list: thousands may wait for one, and each asks again. */
static bool waits(const struct tfd_list *bucket, const struct tfd_mailbox *mailbox,
                  const struct tfd_conn *conn, uint32_t sender)
{
	for (struct tfd_list *link = bucket->next; link != bucket; link = link->next) {
		const struct tfd_waiter *waiter = tfd_container(link, struct tfd_waiter, hash_link);

		if (waiter->mailbox == mailbox && waiter->conn == conn && waiter->sender == sender)
			return true;
	}
	return false;
}

/* False: no memory. */
static bool waiter_add(struct tfd_mailbox *mailbox, struct tfd_conn *conn, uint32_t sender)
{
	struct tfd_worker *worker = conn->group->worker;
	struct tfd_list *bucket = bucket_of(mailbox, conn, sender);
	struct tfd_waiter *waiter = worker->waiter_free;

	if (waits(bucket, mailbox, conn, sender))
		return true;
	if (waiter)
		worker->waiter_free = waiter->next_free;
	else
		waiter = malloc(sizeof(*waiter));
	if (!waiter)
		return false;
	*waiter = (struct tfd_waiter){ .mailbox = mailbox, .conn = conn, .sender = sender };
	tfd_list_push(&mailbox->waiters, &waiter->link);
	tfd_list_push(&conn->channel->waiters, &waiter->conn_link);
	tfd_list_push(bucket, &waiter->hash_link);
	return true;
}

static void wake_one(struct tfd_mailbox *mailbox)
{
	struct tfd_waiter *waiter;

	if (tfd_list_empty(&mailbox->waiters))
		return;
	waiter = tfd_container(mailbox->waiters.next, struct tfd_waiter, link);
	tfd_list_remove(&waiter->link);
	tfd_list_remove(&waiter->hash_link);
	waiter->mailbox = NULL;
	tfd_list_push(&waiter->conn->channel->readies, &waiter->link);
	tfd_conn_wake(waiter->conn);
}

void tfd_mailboxes_check(struct tfd_worker *worker)
{
	struct tfd_list *link;
	struct tfd_list *next;

	worker->next_mailbox_check_ns = worker->now_ns + MAILBOX_CHECK_NS;
	for (link = worker->mailboxes_ready.next; link != &worker->mailboxes_ready; link = next) {
		struct tfd_mailbox *mailbox = tfd_container(link, struct tfd_mailbox, ready_link);

		next = link->next;
		for (uint32_t i = 0; i < mailbox->free_count && !tfd_list_empty(&mailbox->waiters); i++)
			wake_one(mailbox);
		mailbox_note(mailbox);
	}
}

/* ---- slots ---- */

static void slot_give(struct tfd_mailbox *mailbox, uint32_t slot)
{
	mailbox->held[slot].bytes = TFD_NO_SLOT;
	mailbox->free[mailbox->free_count++] = slot;
	wake_one(mailbox);
	mailbox_note(mailbox);
}

static uint8_t *slot_data(const struct tfd_mailbox *mailbox, uint32_t slot)
{
	return mailbox->data + slot * TFD_LINES((uint64_t)mailbox->slot_bytes);
}

/* The counter tells of it last; pairs with the client's acquire of its value. False: its memory is gone, nothing was delivered. */
static bool slot_fill(struct tfd_mailbox *mailbox, uint32_t slot, const uint8_t *payload, uint32_t bytes)
{
	struct tfd_letter letter = { .slot = slot, .bytes = bytes, .number = mailbox->next };

	memcpy(slot_data(mailbox, slot), payload, bytes);
	mailbox->letters[letter.number % mailbox->slots] = letter;
	if (tfd_load_relaxed(&mailbox->region->broken))
		return false;
	mailbox->held[slot] = letter;
	mailbox->order[letter.number % mailbox->slots] = slot;
	mailbox->next++;
	tfd_counter_add(mailbox->session, mailbox->counter);
	return true;
}

void tfd_mailbox_deliver(struct tfd_worker *worker, struct tfd_conn *conn, const struct tfd_frame *frame,
                         const uint8_t *payload, struct tfd_frame *answer)
{
	struct tfd_mailbox *mailbox = tfd_table_get(&worker->mailboxes, frame->target);
	uint32_t slot;

	if (!mailbox) {
		answer->argument = TFD_DETAIL_REVOKED;
		return;
	}
	if (frame->bytes > mailbox->slot_bytes) {
		answer->argument = TFD_DETAIL_DESTINATION_BOUNDS;
		return;
	}
	if (!mailbox->free_count) {
		if (waiter_add(mailbox, conn, frame->argument))
			answer->kind = TFD_ANSWER_FULL;
		else
			answer->argument = TFD_DETAIL_NO_MEMORY;
		return;
	}
	slot = mailbox->free[--mailbox->free_count];
	if (!slot_fill(mailbox, slot, payload, frame->bytes)) {
		slot_give(mailbox, slot);
		answer->argument = TFD_DETAIL_BROKEN_REGION;
		return;
	}
	mailbox_note(mailbox);
	answer->kind = TFD_ANSWER_OK;
}

uint32_t tfd_mailbox_release(struct tfd_session *session, const struct tfd_entry *entry)
{
	struct tfd_mailbox *mailbox = tfd_table_get(&session->group->worker->mailboxes, entry->dst_grant);
	const struct tfd_letter *held;

	if (!mailbox || mailbox->session != session || entry->src_offset >= mailbox->slots)
		return TFD_DETAIL_BAD_MAILBOX;
	held = &mailbox->held[entry->src_offset];
	if (held->bytes == TFD_NO_SLOT || held->number != entry->argument)
		return TFD_DETAIL_BAD_MAILBOX;
	slot_give(mailbox, (uint32_t)entry->src_offset);
	return TFD_DETAIL_NONE;
}

/* ---- its life ---- */

static void mailbox_free(struct tfd_mailbox *mailbox)
{
	if (!mailbox)
		return;
	free(mailbox->free);
	free(mailbox->held);
	free(mailbox->order);
	free(mailbox);
}

static void mailbox_detach(struct tfd_worker *worker, struct tfd_mailbox *mailbox)
{
	while (!tfd_list_empty(&mailbox->waiters))
		tfd_waiter_drop(tfd_container(mailbox->waiters.next, struct tfd_waiter, link));
	tfd_list_remove(&mailbox->ready_link);
	(void)tfd_table_remove(&worker->mailboxes, mailbox->handle);
	mailbox->region->jobs--;
	mailbox->session->mailbox_slots -= mailbox->slots;
	tfd_counter_fault(mailbox->session, mailbox->counter, 0, 0, 0); /* whoever waits for a message */
	tfd_counter_return(mailbox->session, mailbox->counter);
}

void tfd_mailboxes_free(struct tfd_session *session, struct tfd_worker *worker)
{
	while (!tfd_list_empty(&session->mailboxes)) {
		struct tfd_mailbox *mailbox =
			tfd_container(session->mailboxes.next, struct tfd_mailbox, link);

		if (worker)
			mailbox_detach(worker, mailbox);
		tfd_list_remove(&mailbox->link);
		mailbox_free(mailbox);
	}
}

/* ---- control's calls ---- */

struct mailbox_call {
	const struct tfd_mailbox_options *options;
	struct tfd_session *session;
	struct tfd_mailbox *mailbox;
	struct tfd_mailbox_info *info;
	struct tfd_error *error;
	uint64_t handle;
	void *buffer;
	size_t *bytes;
};

static int place(struct mailbox_call *call)
{
	const struct tfd_mailbox_options *options = call->options;
	struct tfd_mailbox *mailbox = call->mailbox;
	struct tfd_region *region = tfd_table_get(&call->session->regions, options->region);
	uint64_t bytes = TFD_MAILBOX_BYTES(options->slots, options->slot_bytes);

	if (!region)
		return tfd_fail(call->error, -ENOENT, "region %llu is not registered in this session",
		                (unsigned long long)options->region);
	if (!region->writable || region->device || options->offset % TFD_LINE)
		return tfd_fail(call->error, -EINVAL,
		                "a mailbox takes a writable region of host memory, at an offset that is a "
		                "multiple of %u",
		                TFD_LINE);
	if (options->offset > region->length || bytes > region->length - options->offset)
		return tfd_fail(call->error, -EINVAL,
		                "%u slots of %u bytes take %llu bytes; the region has %llu from %llu on",
		                options->slots, options->slot_bytes, (unsigned long long)bytes,
		                (unsigned long long)(region->length > options->offset ?
		                                             region->length - options->offset :
		                                             0),
		                (unsigned long long)options->offset);
	mailbox->region = region;
	mailbox->letters = (void *)(region->base + options->offset);
	mailbox->data = region->base + options->offset + TFD_LETTERS_BYTES((uint64_t)options->slots);
	return 0;
}

static int add_command(struct tfd_worker *worker, void *argument)
{
	struct mailbox_call *call = argument;
	struct tfd_mailbox *mailbox = call->mailbox;
	struct tfd_session *session = call->session;
	int rc = session->state >= TFD_STATE_ENDING ? tfd_fail(call->error, -ESHUTDOWN, "the session ends") :
	                                              place(call);

	if (rc)
		return rc;
	if (mailbox->slots > TFD_SESSION_SLOTS - session->mailbox_slots)
		return tfd_fail(call->error, -EDQUOT,
		                "the session's mailboxes have %u slots; they may have %u in all",
		                session->mailbox_slots, TFD_SESSION_SLOTS);
	if (tfd_counter_give_unnamed(session, &mailbox->counter) != 0)
		return tfd_fail(call->error, -ENOSPC, "the session has all its %u counters",
		                session->counter_count);
	rc = tfd_table_add(&worker->mailboxes, mailbox, &mailbox->handle);
	if (rc) {
		tfd_counter_return(session, mailbox->counter);
		return tfd_fail(call->error, rc, "no memory for a mailbox");
	}
	mailbox->next = mailbox->next_taken = session->counts[mailbox->counter].value;
	mailbox->region->jobs++;
	session->mailbox_slots += mailbox->slots;
	tfd_list_push(&session->mailboxes, &mailbox->link);
	*call->info = (struct tfd_mailbox_info){ .mailbox = mailbox->handle,
	                                         .counter = mailbox->counter,
	                                         .first = mailbox->next };
	return 0;
}

static struct tfd_mailbox *find(struct tfd_worker *worker, const struct mailbox_call *call)
{
	struct tfd_mailbox *mailbox = tfd_table_get(&worker->mailboxes, call->handle);

	return mailbox && mailbox->session == call->session ? mailbox : NULL;
}

static int remove_command(struct tfd_worker *worker, void *argument)
{
	struct mailbox_call *call = argument;

	call->mailbox = find(worker, call);
	if (!call->mailbox)
		return -ENOENT;
	mailbox_detach(worker, call->mailbox);
	tfd_list_remove(&call->mailbox->link);
	return 0;
}

static int take_command(struct tfd_worker *worker, void *argument)
{
	struct mailbox_call *call = argument;
	struct tfd_mailbox *mailbox = find(worker, call);

	if (!mailbox)
		return -ENOENT;
	for (; mailbox->next_taken < mailbox->next; mailbox->next_taken++) {
		uint32_t slot = mailbox->order[mailbox->next_taken % mailbox->slots];
		const struct tfd_letter *held = &mailbox->held[slot];

		if (held->bytes == TFD_NO_SLOT || held->number != mailbox->next_taken)
			continue; /* its owner has released it by the ring */
		if (held->bytes > *call->bytes)
			return -EMSGSIZE;
		*call->bytes = held->bytes;
		memcpy(call->buffer, slot_data(mailbox, slot), held->bytes);
		mailbox->next_taken++;
		slot_give(mailbox, slot);
		return 0;
	}
	return -EAGAIN;
}

static struct tfd_mailbox *mailbox_new(struct tfd_session *session, uint32_t slots, uint32_t slot_bytes)
{
	struct tfd_mailbox *mailbox = calloc(1, sizeof(*mailbox));

	if (!mailbox)
		return NULL;
	mailbox->session = session;
	mailbox->slots = mailbox->free_count = slots;
	mailbox->slot_bytes = slot_bytes;
	mailbox->free = calloc(slots, sizeof(*mailbox->free));
	mailbox->held = calloc(slots, sizeof(*mailbox->held));
	mailbox->order = calloc(slots, sizeof(*mailbox->order));
	tfd_list_init(&mailbox->waiters);
	tfd_list_init(&mailbox->link);
	tfd_list_init(&mailbox->ready_link);
	if (!mailbox->free || !mailbox->held || !mailbox->order) {
		mailbox_free(mailbox);
		return NULL;
	}
	for (uint32_t i = 0; i < slots; i++) {
		mailbox->free[i] = slots - 1 - i;
		mailbox->held[i].bytes = TFD_NO_SLOT;
	}
	return mailbox;
}

int tfd_mailbox_add(struct tfd_core *core, uint64_t session, const struct tfd_mailbox_options *options,
                    struct tfd_mailbox_info *out, struct tfd_error *error)
{
	struct mailbox_call call = { .options = options, .info = out, .error = error };
	int rc;

	if (!options->slots || options->slots > TFD_MAILBOX_SLOTS_MAX || !options->slot_bytes ||
	    options->slot_bytes > TFD_MESSAGE_BYTES_MAX)
		return tfd_fail(error, -EINVAL, "%u slots of %u bytes; a mailbox has 1 to %u of 1 to %u",
		                options->slots, options->slot_bytes, TFD_MAILBOX_SLOTS_MAX,
		                TFD_MESSAGE_BYTES_MAX);
	call.session = tfd_session_get(core, session);
	if (!call.session)
		return tfd_fail(error, -ENOENT, "the session has ended");
	call.mailbox = mailbox_new(call.session, options->slots, options->slot_bytes);
	rc = call.mailbox ? tfd_command_run(call.session->group->worker, add_command, &call) :
	                    tfd_fail(error, -ENOMEM, "no memory for a mailbox");
	if (rc)
		mailbox_free(call.mailbox);
	tfd_session_put(call.session);
	return rc;
}

static int mailbox_call(struct tfd_core *core, uint64_t session, struct mailbox_call *call,
                        int (*run)(struct tfd_worker *, void *))
{
	int rc;

	call->session = tfd_session_get(core, session);
	if (!call->session)
		return -ENOENT;
	rc = tfd_command_run(call->session->group->worker, run, call);
	tfd_session_put(call->session);
	return rc;
}

int tfd_mailbox_remove(struct tfd_core *core, uint64_t session, uint64_t mailbox)
{
	struct mailbox_call call = { .handle = mailbox };
	int rc = mailbox_call(core, session, &call, remove_command);

	if (!rc)
		mailbox_free(call.mailbox);
	return rc;
}

int tfd_mailbox_take(struct tfd_core *core, uint64_t session, uint64_t mailbox, void *buffer, size_t *bytes)
{
	struct mailbox_call call = { .handle = mailbox, .buffer = buffer, .bytes = bytes };

	return mailbox_call(core, session, &call, take_command);
}
