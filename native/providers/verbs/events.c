/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a device tells by itself: ibv_get_async_event(3). A thread of the rail takes it and sets a bit of `alarms`; the worker, which looks at
 * that word when it polls, does what there is to do. Each event is acknowledged at once: what it is about cannot be destroyed before.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "../../core/barrier.h"
#include "../../core/futex.h"
#include "../../core/parts.h"
#include "verbs.h"

/* Of a device whose driver cannot take it from its users (rdma_rxe) the kernel tells nothing, and waits until they are gone. */
#define LOOK_MS 1000
#define ALARM_LOW_PART 4u /* of a batch: with all immediates granted, what is not posted again yet is more */

/* ---- the thread of events ---- */

static void alarm_raise(struct tfd_domain *domain, uint32_t alarm)
{
	uint64_t one = 1;

	(void)tfd_or_seq(&domain->alarms,
	                 alarm); /* pairs with tfd_verbs_arm, which looks at it before a sleep */
	(void)!write(domain->wake_fd, &one, sizeof(one));
}

/*
 * Up: its port is active, and has its GID. An address that comes back may be at another place of the table. What a subnet manager has changed
 * (LID, GID) is asked for again as halves are made: those that there are break, as their packets go nowhere.
 */
static void state_renew(struct tfd_domain *domain)
{
	struct tfd_verbs_port *port = &domain->port;
	struct ibv_port_attr attributes;
	bool up;

	if (tfd_load_relaxed(&domain->state) == TFD_RAIL_GONE)
		return;
	up = tfd_verbs_port_query(domain, port->number, &attributes) == 0 &&
	     attributes.state == IBV_PORT_ACTIVE;
	if (port->global) {
		int index = tfd_verbs_gid_find(domain);

		up = up && index >= 0;
		if (index >= 0)
			tfd_store_relaxed(&port->gid_index, (uint32_t)index);
	}
	tfd_store_relaxed(&domain->state, (uint32_t)(up ? TFD_RAIL_UP : TFD_RAIL_DOWN));
}

static void device_gone(struct tfd_domain *domain)
{
	tfd_store_relaxed(&domain->state, (uint32_t)TFD_RAIL_GONE);
	alarm_raise(domain, TFD_VERBS_GONE);
}

static void queue_broke(struct tfd_domain *domain, const struct ibv_qp *qp)
{
	struct tfd_verbs_queue *queue = qp->qp_context;

	tfd_store_release(&queue->broke, 1u); /* pairs with half_tell */
	alarm_raise(domain, TFD_VERBS_HALF_BROKE);
}

/* A queue pair in error has completed all receives that it had taken. */
static void queue_last(struct tfd_domain *domain, const struct ibv_qp *qp)
{
	struct tfd_verbs_queue *queue = qp->qp_context;

	tfd_store_release(&queue->last_wqe,
	                  1u); /* pairs with last_awaited: its completions are in the queue */
	(void)tfd_add_seq(&domain->lasts, 1u); /* pairs with tfd_verbs_half_settle */
	tfd_futex_wake_all(&domain->lasts);
}

static void take_event(struct tfd_domain *domain, const struct ibv_async_event *event)
{
	switch (event->event_type) {
	case IBV_EVENT_DEVICE_FATAL:
		device_gone(domain);
		break;
	case IBV_EVENT_PORT_ACTIVE:
	case IBV_EVENT_PORT_ERR:
	case IBV_EVENT_GID_CHANGE:
	case IBV_EVENT_LID_CHANGE:
	case IBV_EVENT_PKEY_CHANGE:
	case IBV_EVENT_SM_CHANGE:
	case IBV_EVENT_CLIENT_REREGISTER:
		state_renew(domain);
		break;
	case IBV_EVENT_CQ_ERR:
	case IBV_EVENT_SRQ_ERR:
		alarm_raise(domain, TFD_VERBS_OVERRUN);
		break;
	case IBV_EVENT_SRQ_LIMIT_REACHED:
		alarm_raise(domain, TFD_VERBS_SRQ_LOW);
		break;
	case IBV_EVENT_QP_FATAL:
	case IBV_EVENT_QP_REQ_ERR:
	case IBV_EVENT_QP_ACCESS_ERR:
		queue_broke(domain, event->element.qp);
		break;
	case IBV_EVENT_QP_LAST_WQE_REACHED:
		queue_last(domain, event->element.qp);
		break;
	default: /* a connection that is established */
		break;
	}
}

/* Whether the kernel has the device's file still: it goes first, all else waits for those who have it open. */
static bool is_listed(const struct tfd_domain *domain)
{
	char path[128];

	(void)snprintf(path, sizeof(path), "/sys/class/infiniband_verbs/%.64s",
	               domain->context->device->dev_name);
	return access(path, F_OK) == 0;
}

static void *events_run(void *argument)
{
	struct tfd_domain *domain = argument;
	struct pollfd fds[] = { { .fd = domain->stop_fd, .events = POLLIN },
	                        { .fd = domain->context->async_fd, .events = POLLIN } };
	bool listed = is_listed(domain);

	for (;;) {
		struct ibv_async_event event;
		bool gone = tfd_load_relaxed(&domain->state) == TFD_RAIL_GONE;
		int rc;

		if (gone)
			fds[1].fd = -1;
		if (domain->context &&
		    tfd_load_acquire(&domain->quiet) && /* pairs with tfd_verbs_quiet_renew */
		    tfd_verbs_reaped(domain))
			tfd_verbs_device_release(domain);
		rc = poll(fds, 2, listed || (gone && domain->context) ? LOOK_MS : -1);

		if (rc > 0 && fds[0].revents)
			return NULL;
		if (rc < 0)
			continue;
		if (rc == 0) {
			listed = !gone && is_listed(domain);
			if (!gone && !listed)
				device_gone(domain);
		} else if (domain->library->get_async_event(domain->context, &event) == 0) {
			take_event(domain, &event);
			domain->library->ack_async_event(&event);
		} else if (errno != EAGAIN && errno != EINTR) { /* the kernel has let go of the device */
			device_gone(domain);
		}
	}
}

static int fds_open(struct tfd_domain *domain)
{
	struct epoll_event event = { .events = EPOLLIN };
	int flags = fcntl(domain->context->async_fd, F_GETFL);

	domain->stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	domain->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	domain->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	if (flags < 0 || fcntl(domain->context->async_fd, F_SETFL, flags | O_NONBLOCK) != 0 ||
	    domain->stop_fd < 0 || domain->wake_fd < 0 || domain->epoll_fd < 0 ||
	    epoll_ctl(domain->epoll_fd, EPOLL_CTL_ADD, domain->wake_fd, &event) != 0 ||
	    epoll_ctl(domain->epoll_fd, EPOLL_CTL_ADD, domain->channel->fd, &event) != 0)
		return -errno;
	return 0;
}

int tfd_verbs_events_open(struct tfd_domain *domain, struct tfd_error *error)
{
	int rc = fds_open(domain);

	if (!rc)
		rc = -pthread_create(&domain->thread, NULL, events_run, domain);
	if (rc)
		return tfd_fail(error, rc, "a rail's thread of events cannot start: %s", strerror(-rc));
	domain->thread_runs = true;
	(void)pthread_setname_np(domain->thread, "tfd-verbs");
	return 0;
}

void tfd_verbs_events_close(struct tfd_domain *domain)
{
	uint64_t one = 1;

	if (domain->thread_runs) {
		(void)!write(domain->stop_fd, &one, sizeof(one));
		(void)pthread_join(domain->thread, NULL);
	}
	if (domain->stop_fd >= 0)
		(void)close(domain->stop_fd);
	if (domain->wake_fd >= 0)
		(void)close(domain->wake_fd);
	if (domain->epoll_fd >= 0)
		(void)close(domain->epoll_fd);
}

/* ---- the worker's ---- */

void tfd_verbs_quiet_renew(struct tfd_domain *domain)
{
	if (domain->dead && tfd_list_empty(&domain->halves))
		tfd_store_release(&domain->quiet,
		                  1u); /* pairs with events_run: the worker has done with all objects */
}

void tfd_verbs_srq_watch(struct tfd_domain *domain)
{
	struct ibv_srq_attr attributes = { .srq_limit = domain->receive_batch / ALARM_LOW_PART };

	(void)domain->library->modify_srq(domain->srq, &attributes,
	                                  IBV_SRQ_LIMIT); /* some cannot: no alarm */
}

static bool broke(struct tfd_half *half)
{
	for (uint32_t i = 0; i < TFD_VERBS_CHANNELS; i++) {
		if (tfd_load_acquire(&half->queues[i].broke)) /* pairs with queue_broke */
			return true;
	}
	return false;
}

/* Those that broke and were not told; whether there was room for all. */
static bool halves_tell(struct tfd_domain *domain, struct tfd_wc *wc, int max, int *count)
{
	for (struct tfd_list *link = domain->halves.next; link != &domain->halves; link = link->next) {
		struct tfd_half *half = tfd_container(link, struct tfd_half, link);

		if (half->told || half->closed || !broke(half))
			continue;
		if (*count == max)
			return false;
		wc[(*count)++] =
			(struct tfd_wc){ .type = TFD_WC_ERROR, .error = ECONNRESET, .owner = half->owner };
		half->told = true;
	}
	return true;
}

static int one_tell(struct tfd_domain *domain, uint32_t alarm, int error, struct tfd_wc *wc, int max)
{
	if (!(domain->alarmed & alarm) || !max)
		return 0;
	domain->alarmed &= ~alarm;
	*wc = (struct tfd_wc){ .type = TFD_WC_ERROR, .error = error };
	return 1;
}

int tfd_verbs_alarms_take(struct tfd_domain *domain, struct tfd_wc *wc, int max)
{
	int count = 0;

	domain->alarmed |= tfd_swap_seq(&domain->alarms, 0u);
	if ((domain->alarmed & TFD_VERBS_GONE) && !domain->dead) {
		domain->dead = true;
		/* Its fd would be readable for ever. */
		(void)epoll_ctl(domain->epoll_fd, EPOLL_CTL_DEL, domain->channel->fd, NULL);
		tfd_verbs_quiet_renew(domain);
	}
	if (domain->alarmed & TFD_VERBS_OVERRUN)
		domain->overrun = true;
	if ((domain->alarmed & TFD_VERBS_SRQ_LOW) && !domain->dead &&
	    !domain->overrun) /* else it may be none */
		tfd_verbs_srq_watch(domain);
	count += one_tell(domain, TFD_VERBS_GONE, ENODEV, wc, max);
	count += one_tell(domain, TFD_VERBS_OVERRUN, EOVERFLOW, wc + count, max - count);
	count += one_tell(domain, TFD_VERBS_SRQ_LOW, ENOBUFS, wc + count, max - count);
	if ((domain->alarmed & TFD_VERBS_HALF_BROKE) && halves_tell(domain, wc, max, &count))
		domain->alarmed &= ~(uint32_t)TFD_VERBS_HALF_BROKE;
	return count;
}
