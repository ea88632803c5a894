/* SPDX-License-Identifier: Apache-2.0 */
/* Watchers as their owner sees them: which are taken is known here alone. */
#include <errno.h>

#include "../core/barrier.h"
#include "session.h"

int tfd_client_watcher_open(struct tfd_client *client, uint32_t *slot)
{
	uint32_t taken;

	if (!client || tfd_client_over(client))
		return -EPIPE;
	pthread_mutex_lock(&client->lock);
	taken = client->watcher_free;
	if (taken != TFD_NO_WATCHER) {
		client->watcher_free = client->watcher_next[taken];
		client->watcher_next[taken] = TFD_WATCHER_TAKEN;
		tfd_store_relaxed(&client->watchers[taken].value, 0ull); /* nothing waits for it yet */
	}
	pthread_mutex_unlock(&client->lock);
	if (taken == TFD_NO_WATCHER)
		return -ENOSPC;
	*slot = taken;
	return 0;
}

void tfd_client_watcher_close(struct tfd_client *client, uint32_t slot)
{
	if (!client || slot >= client->watcher_count)
		return;
	pthread_mutex_lock(&client->lock);
	if (client->watcher_next[slot] == TFD_WATCHER_TAKEN ||
	    client->watcher_next[slot] == TFD_WATCHER_CLOSING) {
		client->watcher_next[slot] = client->watcher_free;
		client->watcher_free = slot;
	}
	pthread_mutex_unlock(&client->lock);
}

/* A job that another thread arms behind the DISARM would stay behind, and start by the next watcher of that slot. */
int tfd_client_watchers_check_locked(struct tfd_client *client, const struct tfd_entry *entries,
                                     uint32_t count)
{
	for (uint32_t i = 0; i < count; i++) {
		if ((entries[i].flags & TFD_FLAG_ARMED) && entries[i].watcher < client->watcher_count &&
		    client->watcher_next[entries[i].watcher] != TFD_WATCHER_TAKEN)
			return -ESTALE;
	}
	return 0;
}

void tfd_client_watcher_closing_locked(struct tfd_client *client, uint64_t slot)
{
	if (slot < client->watcher_count && client->watcher_next[slot] == TFD_WATCHER_TAKEN)
		client->watcher_next[slot] = TFD_WATCHER_CLOSING;
}

int tfd_client_watcher_bump(struct tfd_client *client, uint32_t slot, uint64_t n)
{
	uint64_t *word;

	if (!client || tfd_client_over(client))
		return -EPIPE;
	if (slot >= client->watcher_count)
		return -ERANGE;
	word = &client->watchers[slot].value;
	if (n > UINT64_MAX - tfd_load_relaxed(word))
		return -ERANGE;
	/*
	 * pairs with tfd_watches_check: what the caller wrote before. Sequential, as need_wakeup is read next: the worker stores that
	 * and looks at the word afterwards (tfd_watches_ready).
	 */
	(void)tfd_add_seq(word, n);
	for (uint32_t i = 0; i < client->ring_count; i++)
		tfd_client_doorbell(&client->rings[i]);
	return 0;
}

int tfd_client_watcher_set(struct tfd_client *client, uint32_t slot, uint64_t value)
{
	if (!client)
		return -EPIPE;
	if (slot >= client->watcher_count)
		return -ERANGE;
	tfd_store_release(&client->watchers[slot].value,
	                  value); /* pairs with a stream's wait for it: the flush before */
	return 0;
}

int tfd_client_watcher_read(struct tfd_client *client, uint32_t slot, uint64_t *value)
{
	if (!client)
		return -EPIPE;
	if (slot >= client->watcher_count)
		return -ERANGE;
	*value = tfd_load_acquire(&client->watchers[slot].value); /* pairs with whoever bumps it */
	return 0;
}
