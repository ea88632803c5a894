/* SPDX-License-Identifier: Apache-2.0 */
/* Events at an fd: asynchronous ones of a context, completion events of a channel; and the waiting for their acknowledgement. */
#include "soft.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#define ACK_SECONDS 20 /* a man page says that destroying waits; a test that would hang should say why */

int soft_inbox_open(struct soft_inbox *inbox)
{
	(void)pthread_mutex_init(&inbox->lock, NULL);
	inbox->first = NULL;
	inbox->last = &inbox->first;
	inbox->fd = eventfd(0, EFD_CLOEXEC | EFD_SEMAPHORE);
	return inbox->fd < 0 ? errno : 0;
}

void soft_inbox_close(struct soft_inbox *inbox)
{
	while (inbox->first) {
		struct soft_event *event = inbox->first;

		inbox->first = event->next;
		free(event);
	}
	(void)close(inbox->fd);
	(void)pthread_mutex_destroy(&inbox->lock);
}

void soft_inbox_put(struct soft_inbox *inbox, const struct ibv_async_event *event, void *about)
{
	struct soft_event *entry = calloc(1, sizeof(*entry));
	uint64_t one = 1;

	if (!entry)
		soft_abort("no memory for an event");
	entry->event = *event;
	entry->about = about;
	(void)pthread_mutex_lock(&inbox->lock);
	*inbox->last = entry;
	inbox->last = &entry->next;
	(void)pthread_mutex_unlock(&inbox->lock);
	if (write(inbox->fd, &one, sizeof(one)) != sizeof(one))
		soft_abort("an event cannot be told: %s", strerror(errno));
}

void soft_inbox_forget(struct soft_inbox *inbox, const void *about)
{
	struct soft_event **at = &inbox->first;

	(void)pthread_mutex_lock(&inbox->lock);
	while (*at) {
		struct soft_event *event = *at;

		if (event->about ==
		    about) { /* the fd stays readable: whoever reads finds nothing, and goes on waiting */
			*at = event->next;
			free(event);
		} else {
			at = &event->next;
		}
	}
	inbox->last = at;
	(void)pthread_mutex_unlock(&inbox->lock);
}

/* As the fd's flags say. `told` of what it is about goes up with the lock held, so that destroying sees it or the event. */
static int inbox_get(struct soft_inbox *inbox, struct ibv_async_event *event,
                     uint32_t *(*told)(const struct soft_event *))
{
	for (;;) {
		struct soft_event *entry;
		uint64_t one;

		if (read(inbox->fd, &one, sizeof(one)) != sizeof(one))
			return -1;
		(void)pthread_mutex_lock(&inbox->lock);
		entry = inbox->first;
		if (entry) {
			uint32_t *count = told(entry);

			inbox->first = entry->next;
			if (!inbox->first)
				inbox->last = &inbox->first;
			if (count)
				++*count;
			*event = entry->event;
		}
		(void)pthread_mutex_unlock(&inbox->lock);
		free(entry);
		if (entry)
			return 0;
	}
}

void soft_raise(struct soft_context *context, enum ibv_event_type type, void *about, uint32_t port)
{
	struct ibv_async_event event = { .event_type = type };

	if (about)
		event.element.qp = about; /* all of its pointers are one */
	else
		event.element.port_num = (int)port;
	soft_inbox_put(&context->events, &event, about);
}

static uint32_t *async_told(const struct soft_event *entry)
{
	switch (entry->event.event_type) {
	case IBV_EVENT_CQ_ERR:
		return &((struct soft_cq *)entry->event.element.cq)->async_told;
	case IBV_EVENT_QP_FATAL:
	case IBV_EVENT_QP_REQ_ERR:
	case IBV_EVENT_QP_ACCESS_ERR:
	case IBV_EVENT_QP_LAST_WQE_REACHED:
		return &((struct soft_qp *)(void *)entry->event.element.qp)->async_told;
	case IBV_EVENT_SRQ_ERR:
	case IBV_EVENT_SRQ_LIMIT_REACHED:
		return &((struct soft_srq *)entry->event.element.srq)->async_told;
	default:
		return NULL;
	}
}

static uint32_t *channel_told(const struct soft_event *entry)
{
	return &((struct soft_cq *)entry->event.element.cq)->told;
}

SOFT_EXPORT int ibv_get_async_event(struct ibv_context *context, struct ibv_async_event *event)
{
	return inbox_get(&soft_context_of(context)->events, event, async_told);
}

static void acknowledge(pthread_mutex_t *mutex, pthread_cond_t *cond, uint32_t *done, uint32_t count)
{
	(void)pthread_mutex_lock(mutex);
	*done += count;
	(void)pthread_cond_signal(cond);
	(void)pthread_mutex_unlock(mutex);
}

SOFT_EXPORT void ibv_ack_async_event(struct ibv_async_event *event)
{
	struct ibv_cq *cq = event->element.cq;
	struct ibv_qp *qp = event->element.qp;
	struct ibv_srq *srq = event->element.srq;

	switch (event->event_type) {
	case IBV_EVENT_CQ_ERR:
		acknowledge(&cq->mutex, &cq->cond, &cq->async_events_completed, 1);
		return;
	case IBV_EVENT_QP_FATAL:
	case IBV_EVENT_QP_REQ_ERR:
	case IBV_EVENT_QP_ACCESS_ERR:
	case IBV_EVENT_QP_LAST_WQE_REACHED:
		acknowledge(&qp->mutex, &qp->cond, &qp->events_completed, 1);
		return;
	case IBV_EVENT_SRQ_ERR:
	case IBV_EVENT_SRQ_LIMIT_REACHED:
		acknowledge(&srq->mutex, &srq->cond, &srq->events_completed, 1);
		return;
	default:
		return;
	}
}

void soft_await_acks(pthread_mutex_t *mutex, pthread_cond_t *cond, const uint32_t *done, uint32_t told,
                     const char *what)
{
	struct timespec end;

	(void)clock_gettime(CLOCK_REALTIME, &end);
	end.tv_sec += ACK_SECONDS;
	(void)pthread_mutex_lock(mutex);
	while (*done != told) {
		if (pthread_cond_timedwait(cond, mutex, &end) == ETIMEDOUT)
			soft_abort("%s waits for the acknowledgement of %u events, for ever", what,
			           told - *done);
	}
	(void)pthread_mutex_unlock(mutex);
}

SOFT_EXPORT struct ibv_comp_channel *ibv_create_comp_channel(struct ibv_context *context)
{
	struct soft_context *soft = soft_context_of(context);
	struct soft_channel *channel;

	if (soft_fails(soft, "ibv_create_comp_channel"))
		return NULL;
	channel = calloc(1, sizeof(*channel));
	if (!channel)
		return NULL;
	if (soft_inbox_open(&channel->events)) {
		free(channel);
		return NULL;
	}
	channel->channel.context = context;
	channel->channel.fd = channel->events.fd;
	soft_lock();
	soft->objects++;
	soft->device->counts.channels++;
	soft_unlock();
	return &channel->channel;
}

SOFT_EXPORT int ibv_destroy_comp_channel(struct ibv_comp_channel *channel)
{
	struct soft_context *context = soft_context_of(channel->context);

	if (soft_fails(NULL, "ibv_destroy_comp_channel"))
		return errno;
	soft_lock();
	if (channel->refcnt) {
		soft_unlock();
		return soft_refuse(EBUSY, "ibv_destroy_comp_channel: %d completion queues use it",
		                   channel->refcnt);
	}
	context->objects--;
	context->device->counts.channels--;
	soft_unlock();
	soft_inbox_close(&((struct soft_channel *)channel)->events);
	free(channel);
	return 0;
}

SOFT_EXPORT int ibv_get_cq_event(struct ibv_comp_channel *channel, struct ibv_cq **cq, void **cq_context)
{
	struct ibv_async_event event;

	if (inbox_get(&((struct soft_channel *)channel)->events, &event, channel_told))
		return -1;
	*cq = event.element.cq;
	*cq_context = event.element.cq->cq_context;
	return 0;
}

SOFT_EXPORT void ibv_ack_cq_events(struct ibv_cq *cq, unsigned int count)
{
	acknowledge(&cq->mutex, &cq->cond, &cq->comp_events_completed, count);
}
