/* SPDX-License-Identifier: Apache-2.0 */
/* Failures on demand: a directory that is looked into at each call. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/barrier.h"
#include "soft.h"

static int broken;

int soft_broken(void)
{
	return tfd_load_acquire(&broken);
}

void soft_break(int result)
{
	tfd_store_release(&broken, result);
}

/* Reads `name` of the directory: its number, and whether the word "always" follows; -1: there is none. */
static int look(const char *name, bool *always)
{
	const char *directory = getenv("SOFTCUDA_FAULTS");
	char path[512], text[64] = "", word[16] = "";
	int number = -1, fd;
	ssize_t size;

	if (!directory)
		return -1;
	(void)snprintf(path, sizeof(path), "%s/%s", directory, name);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return -1;
	size = read(fd, text, sizeof(text) - 1);
	(void)close(fd);
	if (size <= 0 || sscanf(text, "%d %15s", &number, word) < 1)
		return -1;
	*always = strcmp(word, "always") == 0;
	/* Of several that see it only the one that takes it away has it. */
	if (!*always && unlink(path) != 0)
		return -1;
	return number;
}

int soft_fault(const char *call)
{
	bool always = false;
	int result = look(call, &always);

	return result > 0 ? result : 0;
}

int soft_enter(const char *call)
{
	int result = soft_fault("context");

	if (result)
		soft_break(result);
	result = soft_broken();
	return result ? result : soft_fault(call);
}

unsigned soft_slow(void)
{
	const char *directory = getenv("SOFTCUDA_FAULTS");
	char path[512], text[32] = "";
	ssize_t size;
	int fd;

	if (!directory)
		return 0;
	(void)snprintf(path, sizeof(path), "%s/slow", directory);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return 0;
	size = read(fd, text, sizeof(text) - 1);
	(void)close(fd);
	return size > 0 ? (unsigned)strtoul(text, NULL, 10) : 0;
}
