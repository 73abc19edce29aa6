/*
 * Stands in for QEMU where only the way to it is measured: statically linked, so that it opens no file.
 * It ends at once, or, with the word `wait` as its last argument, when it is killed.
 */
#include <string.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	if (strcmp(argv[argc - 1], "wait") == 0)
		for (;;)
			pause();
	return 0;
}
