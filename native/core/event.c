/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Events for the control plane: a queue under a lock, and an eventfd. A worker never waits for that lock: it
 * collects events of its own and hands them over when the lock is free.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "barrier.h"
#include "parts.h"

int tfd_events_open(struct tfd_core *core)
{
	core->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (core->event_fd < 0)
		return -errno;
	(void)pthread_mutex_init(&core->event_lock, NULL);
	return 0;
}

void tfd_events_close(struct tfd_core *core)
{
	(void)close(core->event_fd);
	(void)pthread_mutex_destroy(&core->event_lock);
	free(core->queue);
}

static void event_signal(struct tfd_core *core)
{
	uint64_t one = 1;

	(void)!write(core->event_fd, &one, sizeof(one));
}

static int queue_grow(struct tfd_core *core, uint32_t needed)
{
	uint32_t capacity = core->queue_capacity ? core->queue_capacity : 256;
	struct tfd_event *queue;

	while (capacity < needed)
		capacity *= 2;
	if (capacity == core->queue_capacity)
		return 0;
	queue = malloc(capacity * sizeof(*queue));
	if (!queue)
		return -ENOMEM;
	for (uint32_t i = 0; i < core->queue_count; i++)
		queue[i] = core->queue[(core->queue_head + i) % core->queue_capacity];
	free(core->queue);
	core->queue = queue;
	core->queue_head = 0;
	core->queue_capacity = capacity;
	return 0;
}

/* Returns how many were taken. */
static uint32_t queue_add_locked(struct tfd_core *core, const struct tfd_event *events, uint32_t count)
{
	uint32_t room;

	(void)queue_grow(core, core->queue_count + count); /* without memory: what fits */
	room = core->queue_capacity - core->queue_count;
	if (count > room)
		count = room;
	for (uint32_t i = 0; i < count; i++)
		core->queue[(core->queue_head + core->queue_count + i) % core->queue_capacity] = events[i];
	core->queue_count += count;
	return count;
}

void tfd_event_push(struct tfd_core *core, const struct tfd_event *event)
{
	(void)pthread_mutex_lock(&core->event_lock);
	(void)queue_add_locked(core, event, 1);
	(void)pthread_mutex_unlock(&core->event_lock);
	event_signal(core);
}

static void hand_over_locked(struct tfd_worker *worker)
{
	uint32_t taken = queue_add_locked(worker->core, worker->events, worker->event_count);

	worker->event_count -= taken;
	memmove(worker->events, worker->events + taken, worker->event_count * sizeof(*worker->events));
	if (taken)
		event_signal(worker->core);
}

void tfd_event_post(struct tfd_worker *worker, const struct tfd_event *event)
{
	/* A thousand events since the last pass: rather wait for control than lose one. */
	while (worker->event_count == TFD_PENDING_EVENTS) {
		(void)pthread_mutex_lock(&worker->core->event_lock);
		hand_over_locked(worker);
		(void)pthread_mutex_unlock(&worker->core->event_lock);
	}
	worker->events[worker->event_count++] = *event;
}

void tfd_events_flush(struct tfd_worker *worker)
{
	if (!worker->event_count || pthread_mutex_trylock(&worker->core->event_lock) != 0)
		return;
	hand_over_locked(worker);
	(void)pthread_mutex_unlock(&worker->core->event_lock);
}

int tfd_core_event_fd(const struct tfd_core *core)
{
	return core->event_fd;
}

/* Lets the session's rings go on, if they wait for this (drain_rings). */
static void loss_taken(struct tfd_core *core, uint64_t handle)
{
	struct tfd_session *session;

	(void)pthread_mutex_lock(&core->lock);
	session = tfd_table_get(&core->sessions, handle);
	if (session)
		(void)tfd_sub_seq(&session->losses_queued, 1);
	(void)pthread_mutex_unlock(&core->lock);
}

uint32_t tfd_core_events(struct tfd_core *core, struct tfd_event *events, uint32_t max)
{
	uint64_t ignored;
	uint32_t count;

	(void)!read(core->event_fd, &ignored, sizeof(ignored));
	(void)pthread_mutex_lock(&core->event_lock);
	count = core->queue_count < max ? core->queue_count : max;
	for (uint32_t i = 0; i < count; i++)
		events[i] = core->queue[(core->queue_head + i) % core->queue_capacity];
	if (count)
		core->queue_head = (core->queue_head + count) % core->queue_capacity;
	core->queue_count -= count;
	if (core->queue_count)
		event_signal(core);
	(void)pthread_mutex_unlock(&core->event_lock);
	for (uint32_t i = 0; i < count; i++) {
		if (events[i].type == TFD_EVENT_LOST)
			loss_taken(core, events[i].session);
	}
	return count;
}
