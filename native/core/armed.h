/* SPDX-License-Identifier: Apache-2.0 */
/* What a session keeps for jobs that are not there yet: watchers with those that wait for them, and plans. */
#ifndef TFD_ARMED_H
#define TFD_ARMED_H

#include "model.h"

/* A watcher and the jobs that wait for it. Owner: worker. */
struct tfd_watch {
	struct tfd_session *session;
	uint64_t *word; /* untrusted; in the segment */
	struct tfd_heap jobs;
	struct tfd_list link; /* worker->watched while there are any */
};

/* A job that is kept to be launched. Owner: worker. */
struct tfd_template {
	struct tfd_template *next_free;
	struct tfd_entry entry; /* of each launch, but for its name, deadline and watcher */
	uint8_t plan_class; /* how many targets there is room for */
	struct tfd_target targets[]; /* of a scatter or barrier */
};

#endif
