/* SPDX-License-Identifier: Apache-2.0 */
/*
 * libibverbs, opened with dlopen. What posts and polls is not among its symbols: it is reached through a device's own table
 * (ibv_context.ops, verbs_context), as the inline functions of verbs.h do.
 */
#ifndef TFD_VERBS_LOADER_H
#define TFD_VERBS_LOADER_H

#include <infiniband/verbs.h>

#include "transferd/core.h"

/* Each by the name that the library has it under: X(field, symbol). */
#define TFD_VERBS_SYMBOLS(X)                              \
	X(get_device_list, ibv_get_device_list)           \
	X(free_device_list, ibv_free_device_list)         \
	X(get_device_name, ibv_get_device_name)           \
	X(open_device, ibv_open_device)                   \
	X(close_device, ibv_close_device)                 \
	X(get_async_event, ibv_get_async_event)           \
	X(ack_async_event, ibv_ack_async_event)           \
	X(query_device, ibv_query_device)                 \
	X(query_port, ibv_query_port)                     \
	X(query_gid_table, _ibv_query_gid_table)          \
	X(query_pkey, ibv_query_pkey)                     \
	X(alloc_pd, ibv_alloc_pd)                         \
	X(dealloc_pd, ibv_dealloc_pd)                     \
	X(reg_mr_iova2, ibv_reg_mr_iova2)                 \
	X(dereg_mr, ibv_dereg_mr)                         \
	X(create_comp_channel, ibv_create_comp_channel)   \
	X(destroy_comp_channel, ibv_destroy_comp_channel) \
	X(create_cq, ibv_create_cq)                       \
	X(destroy_cq, ibv_destroy_cq)                     \
	X(get_cq_event, ibv_get_cq_event)                 \
	X(ack_cq_events, ibv_ack_cq_events)               \
	X(create_srq, ibv_create_srq)                     \
	X(modify_srq, ibv_modify_srq)                     \
	X(destroy_srq, ibv_destroy_srq)                   \
	X(create_qp, ibv_create_qp)                       \
	X(modify_qp, ibv_modify_qp)                       \
	X(destroy_qp, ibv_destroy_qp)                     \
	X(fork_init, ibv_fork_init)                       \
	X(wc_status_str, ibv_wc_status_str)

/* What newer libraries have; NULL where it is missing. */
#define TFD_VERBS_OPTIONAL(X)                           \
	X(qp_to_qp_ex, ibv_qp_to_qp_ex)                 \
	X(reg_dmabuf_mr, ibv_reg_dmabuf_mr)             \
	X(create_ah, ibv_create_ah)                     \
	X(is_fork_initialized, ibv_is_fork_initialized) \
	X(destroy_ah, ibv_destroy_ah)

#define TFD_VERBS_FIELD(field, symbol) __typeof__(&symbol) field;

struct tfd_verbs_library {
	TFD_VERBS_SYMBOLS(TFD_VERBS_FIELD)
	TFD_VERBS_OPTIONAL(TFD_VERBS_FIELD)
};

/* Loads it once per process. -ENOENT: not there; -ENOTSUP: too old; error says what to install. `path` "": dlopen finds it. */
int tfd_verbs_load(const char *path, const struct tfd_verbs_library **out, struct tfd_error *error);

#endif
