/* SPDX-License-Identifier: Apache-2.0 */
/* What is EFA's alone. Everything of `struct tfd_fi_efa` is the worker's. */
#ifndef TFD_LIBFABRIC_EFA_H
#define TFD_LIBFABRIC_EFA_H

#include "domain.h"

struct tfd_fi_efa;

bool tfd_fi_is_efa(const struct fi_info *info);
/* Whether that is what a configuration calls it. */
bool tfd_fi_efa_named(const char *fabric);
/* Finds a device's domain. -ENODEV, -ENOTSUP. */
int tfd_fi_efa_find(struct tfd_domain *domain, const char *fabric, const char *device,
                    struct tfd_error *error);
int tfd_fi_efa_open(struct tfd_domain *domain, struct tfd_error *error);
void tfd_fi_efa_close(struct tfd_fi_efa *efa);
int tfd_fi_efa_describe(struct tfd_domain *domain, struct tfd_rail_info *info, struct tfd_error *error);
/* Of an endpoint: has no processor look at what is posted. -FI_E…: it will. */
int tfd_fi_efa_leave_to_device(const struct tfd_half *half);
/* Whether the far side refused the key, the range or the right. */
bool tfd_fi_efa_refused(int prov_errno);

/* A context for a post of this wr; NULL: none is free. */
void *tfd_fi_efa_op(struct tfd_half *half, struct tfd_wr *wr);
/*
 * The context is back; of which wr it was. NULL: of none, because it was told as flushed when its half was closed, and comes back late after
 * all; which no version is known to do. It is then the last to be used again, so that what is late finds nothing of another post.
 */
struct tfd_wr *tfd_fi_efa_op_done(struct tfd_fi_efa *efa, void *context);

/*
 * What the queue holds of an endpoint is ignored once that is closed, and what it has in flight ends untold. So before the close
 * everything is taken out of the queue and kept for the next polls; after it what was in flight is said to have failed.
 */
void tfd_fi_efa_keep(struct tfd_domain *domain);
void tfd_fi_efa_flush(struct tfd_half *half);
bool tfd_fi_efa_kept(const struct tfd_fi_efa *efa);
int tfd_fi_efa_poll(struct tfd_domain *domain, struct tfd_wc *wc, int max);

#endif
