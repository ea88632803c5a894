/* SPDX-License-Identifier: Apache-2.0 */
/* What tests order and ask (softverbs.h), and the names of statuses. */
#include "soft.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "core/barrier.h"

/* A verb that is to fail. `ordered` is looked at without the lock by every verb. */
static struct {
	pthread_mutex_t lock;
	uint32_t ordered;
	char verb[40]; /* "": any that makes or changes something */
	uint32_t skip;
	int error;
	int done;
} order = { .lock = PTHREAD_MUTEX_INITIALIZER };

/* What "any" does not mean: there is no caller that could go on without them, or they make nothing. */
static int is_ordinary(const char *verb)
{
	static const char *const others[] = { "ibv_destroy_", "ibv_dealloc_", "ibv_dereg_",
	                                      "ibv_post_",    "ibv_wr_",      "ibv_fork_" };

	for (size_t i = 0; i < sizeof(others) / sizeof(others[0]); i++) {
		if (strncmp(verb, others[i], strlen(others[i])) == 0)
			return 0;
	}
	return 1;
}

int soft_fails(const struct soft_context *context, const char *verb)
{
	int error = 0;

	if (context && tfd_load_relaxed(&context->gone)) {
		errno = EIO;
		return EIO;
	}
	if (!tfd_load_relaxed(&order.ordered))
		return 0;
	(void)pthread_mutex_lock(&order.lock);
	if (order.ordered && (order.verb[0] ? strcmp(order.verb, verb) == 0 : is_ordinary(verb)) &&
	    !order.skip--) {
		error = order.error;
		order.done = 1;
		tfd_store_relaxed(&order.ordered, 0);
	}
	(void)pthread_mutex_unlock(&order.lock);
	if (error)
		errno = error;
	return error;
}

SOFT_EXPORT void softverbs_fail(const char *verb, uint32_t skip, int error)
{
	(void)pthread_mutex_lock(&order.lock);
	(void)snprintf(order.verb, sizeof(order.verb), "%s", verb ? verb : "");
	order.skip = skip;
	order.error = error;
	order.done = 0;
	tfd_store_relaxed(&order.ordered, error != 0);
	(void)pthread_mutex_unlock(&order.lock);
}

SOFT_EXPORT int softverbs_failed(void)
{
	int done;

	(void)pthread_mutex_lock(&order.lock);
	done = order.done;
	(void)pthread_mutex_unlock(&order.lock);
	return done;
}

#define COUNTED (offsetof(struct softverbs_counts, srq_low) / sizeof(uint64_t)) /* those that many add to */

SOFT_EXPORT void softverbs_counts(const char *name, struct softverbs_counts *out)
{
	uint64_t words[COUNTED], *counted;
	struct softverbs_counts *counts;

	soft_lock();
	counts = &soft_device_find(name)->counts;
	counted = (uint64_t *)counts;
	for (size_t i = 0; i < COUNTED; i++)
		words[i] = tfd_load_relaxed(&counted[i]);
	memcpy(out, words, sizeof(words));
	out->srq_low = tfd_load_relaxed(&counts->srq_low);
	out->cq_high = tfd_load_relaxed(&counts->cq_high);
	out->srq_entries = tfd_load_relaxed(&counts->srq_entries);
	out->contexts = counts->contexts;
	out->pds = counts->pds;
	out->mrs = counts->mrs;
	out->channels = counts->channels;
	out->cqs = counts->cqs;
	out->srqs = counts->srqs;
	out->qps = counts->qps;
	soft_unlock();
}

SOFT_EXPORT void softverbs_counts_clear(const char *name)
{
	struct softverbs_counts *counts;
	uint64_t *counted;

	soft_lock();
	counts = &soft_device_find(name)->counts;
	counted = (uint64_t *)counts;
	for (size_t i = 0; i < COUNTED; i++)
		tfd_store_relaxed(&counted[i], 0);
	tfd_store_relaxed(&counts->srq_low, UINT32_MAX);
	tfd_store_relaxed(&counts->cq_high, 0);
	soft_unlock();
}

/* fabric.lock. What waited for something to change tries again. */
static void kick_all(void)
{
	for (uint32_t i = 0; i < SOFT_QPS; i++) {
		struct soft_qp *qp = fabric.qps[i];

		if (!qp)
			continue;
		if (qp->due_ns == SOFT_NEVER)
			qp->due_ns = 0;
		soft_kick_locked(qp);
	}
}

/* fabric.lock */
static void raise_all(const struct soft_device *device, enum ibv_event_type type, uint32_t port)
{
	for (struct soft_context *context = fabric.contexts; context; context = context->next) {
		if (context->device == device && !context->gone)
			soft_raise(context, type, NULL, port);
	}
}

SOFT_EXPORT void softverbs_port(const char *name, uint32_t port, int up)
{
	struct soft_device *device;

	soft_lock();
	device = soft_device_find(name);
	device->ports[port - 1].up = up != 0;
	raise_all(device, up ? IBV_EVENT_PORT_ACTIVE : IBV_EVENT_PORT_ERR, port);
	kick_all();
	soft_unlock();
}

SOFT_EXPORT void softverbs_given(const char *name, uint32_t port, uint32_t lid, uint32_t mtu)
{
	struct soft_device *device;

	soft_lock();
	device = soft_device_find(name);
	device->ports[port - 1].lid = (uint16_t)lid;
	device->ports[port - 1].mtu = mtu;
	soft_unlock();
}

SOFT_EXPORT void softverbs_port_event(const char *name, uint32_t port, int type)
{
	soft_lock();
	raise_all(soft_device_find(name), (enum ibv_event_type)type, port);
	soft_unlock();
}

SOFT_EXPORT void softverbs_pkey(const char *name, uint32_t port, uint32_t index, uint32_t pkey)
{
	soft_lock();
	soft_configure_once();
	soft_device_find(name)->ports[port - 1].pkeys[index] = (uint16_t)pkey;
	soft_unlock();
}

SOFT_EXPORT void softverbs_cut(const char *name, int on)
{
	soft_lock();
	soft_device_find(name)->cut = on != 0;
	kick_all();
	soft_unlock();
}

SOFT_EXPORT void softverbs_hold(const char *name, int on)
{
	soft_lock();
	soft_device_find(name)->held = on != 0;
	kick_all();
	soft_unlock();
}

SOFT_EXPORT void softverbs_delay(uint64_t ns)
{
	tfd_store_relaxed(&fabric.delay_ns, ns);
}

SOFT_EXPORT void softverbs_remove(const char *name)
{
	struct soft_device *device;

	soft_lock();
	device = soft_device_find(name);
	raise_all(device, IBV_EVENT_DEVICE_FATAL, 0);
	device->removed = 1;
	for (struct soft_context *context = fabric.contexts; context; context = context->next) {
		if (context->device == device)
			tfd_store_relaxed(&context->gone, 1);
	}
	kick_all();
	soft_unlock();
}

SOFT_EXPORT void softverbs_back(const char *name)
{
	soft_lock();
	soft_device_find(name)->removed = 0;
	soft_unlock();
}

SOFT_EXPORT int softverbs_qp_fatal(uint32_t number)
{
	struct soft_qp *qp;

	soft_lock();
	qp = soft_qp_find(number);
	if (qp)
		soft_qp_break(qp, IBV_EVENT_QP_FATAL);
	soft_unlock();
	return qp ? 0 : -1;
}

SOFT_EXPORT uint32_t softverbs_qps(const char *name, uint32_t *out, uint32_t max)
{
	const struct soft_device *device;
	uint32_t found = 0;

	soft_lock();
	device = soft_device_find(name);
	for (uint32_t i = 0; i < SOFT_QPS; i++) {
		const struct soft_qp *qp = fabric.qps[i];

		if (!qp || qp->context->device != device)
			continue;
		if (found < max)
			out[found] = qp->number;
		found++;
	}
	soft_unlock();
	return found;
}

SOFT_EXPORT int softverbs_qp_state(uint32_t number)
{
	const struct soft_qp *qp;
	int state;

	soft_lock();
	qp = soft_qp_find(number);
	state = qp ? (int)qp->state : -1;
	soft_unlock();
	return state;
}

SOFT_EXPORT void softverbs_overrun(const char *name, int receive)
{
	soft_lock();
	soft_device_find(name)->overrun[receive != 0] = 1;
	soft_unlock();
}

SOFT_EXPORT void softverbs_wc_fail(const char *name, uint32_t skip, int status)
{
	struct soft_device *device;

	soft_lock();
	device = soft_device_find(name);
	device->fail_after = skip + 1;
	device->fail_status = status;
	soft_unlock();
}

SOFT_EXPORT void softverbs_lose_ack(const char *name, uint32_t skip)
{
	soft_lock();
	soft_device_find(name)->unacked_after = skip + 1;
	soft_unlock();
}

SOFT_EXPORT void softverbs_late(const char *name, uint32_t count)
{
	soft_lock();
	soft_device_find(name)->late = count;
	soft_unlock();
}

SOFT_EXPORT void softverbs_last_hold(const char *name, int on)
{
	soft_lock();
	soft_device_find(name)->last_held = on != 0;
	kick_all();
	soft_unlock();
}

SOFT_EXPORT void softverbs_memlock(uint64_t bytes)
{
	soft_lock();
	soft_configure_once();
	fabric.config.memlock = bytes;
	soft_unlock();
}

SOFT_EXPORT int softverbs_gid(const char *name, uint32_t port, uint32_t index, const char *word)
{
	struct soft_device *device;
	int failed;

	soft_lock();
	device = soft_device_find(name);
	failed = soft_gid_parse(word, (uint32_t)(device - fabric.devices), port,
	                        &device->ports[port - 1].gids[index]);
	if (!failed)
		raise_all(device, IBV_EVENT_GID_CHANGE, port);
	kick_all();
	soft_unlock();
	return failed;
}

SOFT_EXPORT const char *ibv_wc_status_str(enum ibv_wc_status status)
{
	static const char *const names[] = {
		[IBV_WC_SUCCESS] = "success",
		[IBV_WC_LOC_LEN_ERR] = "local length error",
		[IBV_WC_LOC_QP_OP_ERR] = "local QP operation error",
		[IBV_WC_LOC_PROT_ERR] = "local protection error",
		[IBV_WC_WR_FLUSH_ERR] = "Work Request Flushed Error",
		[IBV_WC_REM_INV_REQ_ERR] = "remote invalid request error",
		[IBV_WC_REM_ACCESS_ERR] = "remote access error",
		[IBV_WC_REM_OP_ERR] = "remote operation error",
		[IBV_WC_RETRY_EXC_ERR] = "transport retry counter exceeded",
		[IBV_WC_RNR_RETRY_EXC_ERR] = "RNR retry counter exceeded",
		[IBV_WC_FATAL_ERR] = "fatal error",
		[IBV_WC_GENERAL_ERR] = "general error",
	};

	if ((size_t)status < sizeof(names) / sizeof(names[0]) && names[status])
		return names[status];
	return "unknown";
}

SOFT_EXPORT const char *ibv_event_type_str(enum ibv_event_type type)
{
	static const char *const names[] = {
		[IBV_EVENT_CQ_ERR] = "CQ error",
		[IBV_EVENT_QP_FATAL] = "local work queue catastrophic error",
		[IBV_EVENT_QP_REQ_ERR] = "invalid request local work queue error",
		[IBV_EVENT_QP_ACCESS_ERR] = "local access violation work queue error",
		[IBV_EVENT_DEVICE_FATAL] = "local catastrophic error",
		[IBV_EVENT_PORT_ACTIVE] = "port active",
		[IBV_EVENT_PORT_ERR] = "port error",
		[IBV_EVENT_SRQ_LIMIT_REACHED] = "SRQ limit reached",
		[IBV_EVENT_QP_LAST_WQE_REACHED] = "last WQE reached",
		[IBV_EVENT_GID_CHANGE] = "GID table change",
	};

	if ((size_t)type < sizeof(names) / sizeof(names[0]) && names[type])
		return names[type];
	return "unknown";
}
