/* SPDX-License-Identifier: Apache-2.0 */
/* Intrusive circular list. A link that is in no list points at itself. */
#ifndef TFD_LIST_H
#define TFD_LIST_H

#include <stdbool.h>
#include <stddef.h>

#include "model.h"

#define tfd_container(pointer, type, member) ((type *)(void *)((char *)(pointer) - offsetof(type, member)))

static inline void tfd_list_init(struct tfd_list *list)
{
	list->next = list->prev = list;
}

static inline bool tfd_list_empty(const struct tfd_list *list)
{
	return list->next == list;
}

static inline void tfd_list_push(struct tfd_list *list, struct tfd_list *link)
{
	link->prev = list->prev;
	link->next = list;
	list->prev->next = link;
	list->prev = link;
}

static inline void tfd_list_remove(struct tfd_list *link)
{
	link->prev->next = link->next;
	link->next->prev = link->prev;
	tfd_list_init(link);
}

#endif
