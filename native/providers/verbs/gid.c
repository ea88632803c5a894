/* SPDX-License-Identifier: Apache-2.0 */
/*
 * RoCE v2 only: packets of RoCE v1 are no IP packets, so they end at the first router, and both ends must have the same.
 * An IPv4 address before an IPv6 one: where a host has both, the former is what its fabric was configured with. A link-local
 * address reaches one link, and on hosts with several links it does not say which.
 */
#include "gid.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <stdio.h>
#include <string.h>

static bool is_ipv4(const uint8_t raw[16])
{
	static const uint8_t mapped[12] = { [10] = 0xff, [11] = 0xff };

	return memcmp(raw, mapped, sizeof(mapped)) == 0;
}

static bool is_link_local(const uint8_t raw[16])
{
	if (is_ipv4(raw))
		return raw[12] == 169 && raw[13] == 254;
	return raw[0] == 0xfe && (raw[1] & 0xc0) == 0x80;
}

/* An address that no host has for others. */
static bool is_nobodys(const uint8_t raw[16])
{
	static const uint8_t zeros[15];

	if (is_ipv4(raw))
		return raw[12] == 0 || raw[12] == 127 || raw[12] >= 224;
	return raw[0] == 0xff || memcmp(raw, zeros, sizeof(zeros)) == 0; /* ::, ::1 */
}

enum tfd_gid_rank tfd_gid_rank(const struct tfd_gid *gid)
{
	if (gid->type != TFD_GID_ROCE_V2 || gid->index > TFD_GID_INDEX_MAX || is_nobodys(gid->raw))
		return TFD_GID_UNUSABLE;
	if (is_link_local(gid->raw))
		return TFD_GID_LINK_LOCAL;
	return is_ipv4(gid->raw) ? TFD_GID_IPV4 : TFD_GID_IPV6;
}

bool tfd_gid_is(const struct tfd_gid *gid, const char *wanted)
{
	uint8_t address[16] = { [10] = 0xff, [11] = 0xff };

	if (strcmp(gid->netdev, wanted) == 0)
		return true;
	return (inet_pton(AF_INET, wanted, address + 12) == 1 || inet_pton(AF_INET6, wanted, address) == 1) &&
	       memcmp(address, gid->raw, sizeof(address)) == 0;
}

const struct tfd_gid *tfd_gid_choose(const struct tfd_gid *gids, size_t count, bool link_local,
                                     const char *wanted)
{
	enum tfd_gid_rank least = link_local ? TFD_GID_LINK_LOCAL : TFD_GID_IPV6;
	const struct tfd_gid *best = NULL;

	for (size_t i = 0; i < count; i++) {
		enum tfd_gid_rank rank = tfd_gid_rank(&gids[i]);

		if (rank < least || (wanted && !tfd_gid_is(&gids[i], wanted)))
			continue;
		if (!best || rank > tfd_gid_rank(best))
			best = &gids[i];
	}
	return best;
}

static const char *type_text(const struct tfd_gid *gid)
{
	if (gid->type == TFD_GID_IB)
		return "InfiniBand";
	if (gid->type == TFD_GID_ROCE_V1)
		return "RoCE v1";
	return is_link_local(gid->raw) ? "RoCE v2, link-local" : "RoCE v2";
}

void tfd_gid_text(const struct tfd_gid *gid, char text[TFD_GID_TEXT])
{
	char address[INET6_ADDRSTRLEN];

	if (is_ipv4(gid->raw))
		(void)inet_ntop(AF_INET, gid->raw + 12, address, sizeof(address));
	else
		(void)inet_ntop(AF_INET6, gid->raw, address, sizeof(address));
	(void)snprintf(text, TFD_GID_TEXT, "%s (%s)", address, type_text(gid));
}

void tfd_gids_text(const struct tfd_gid *gids, size_t count, const struct tfd_gid *but, char *text,
                   size_t bytes)
{
	size_t used = 0, shown = 0, left = 0;

	text[0] = 0;
	for (size_t i = 0; i < count; i++) {
		char one[TFD_GID_TEXT];

		if (&gids[i] == but)
			continue;
		if (shown == 3 || used + sizeof(one) + 16 > bytes) {
			left++;
			continue;
		}
		tfd_gid_text(&gids[i], one);
		used += (size_t)snprintf(text + used, bytes - used, "%s%u: %s", shown++ ? ", " : "",
		                         gids[i].index, one);
	}
	if (left && used + 16 < bytes)
		(void)snprintf(text + used, bytes - used, ", %zu more", left);
}
