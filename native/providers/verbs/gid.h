/* SPDX-License-Identifier: Apache-2.0 */
/* Which entry of a port's GID table a rail goes by. Pure: over a table, wherever that came from. */
#ifndef TFD_VERBS_GID_H
#define TFD_VERBS_GID_H

#include <net/if.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define TFD_GID_TEXT 72 /* of one GID, with what it is */
#define TFD_GID_INDEX_MAX 255u /* that a path can name (struct ibv_global_route); tables may be longer */

enum tfd_gid_type {
	TFD_GID_IB = 0,
	TFD_GID_ROCE_V1 = 1,
	TFD_GID_ROCE_V2 = 2,
};

struct tfd_gid {
	uint8_t raw[16];
	uint32_t index;
	uint32_t type; /* enum tfd_gid_type */
	char netdev[IF_NAMESIZE]; /* the interface that it belongs to, or "" */
};

/* How good an entry is; the better the higher. */
enum tfd_gid_rank {
	TFD_GID_UNUSABLE =
		0, /* zero, loopback, multicast, of RoCE v1, or with an index that no path can name */
	TFD_GID_LINK_LOCAL = 1, /* RoCE v2, on this link only: if told */
	TFD_GID_IPV6 = 2, /* RoCE v2 */
	TFD_GID_IPV4 = 3, /* RoCE v2, an IPv4 address */
};

enum tfd_gid_rank tfd_gid_rank(const struct tfd_gid *gid);

/*
 * The first entry of the highest rank; NULL: none will do. `wanted`: a name of an interface or an address, only whose entries are looked at;
 * NULL: any.
 */
const struct tfd_gid *tfd_gid_choose(const struct tfd_gid *gids, size_t count, bool link_local,
                                     const char *wanted);
/* Whether the entry belongs to that interface, or is that address. */
bool tfd_gid_is(const struct tfd_gid *gid, const char *wanted);

/* "10.9.0.1 (RoCE v2)" */
void tfd_gid_text(const struct tfd_gid *gid, char text[TFD_GID_TEXT]);
/* Those that are not `but`, at most three: "0: fe80::1 (RoCE v2, link-local), …"; "" if there are none. */
void tfd_gids_text(const struct tfd_gid *gids, size_t count, const struct tfd_gid *but, char *text,
                   size_t bytes);

#endif
