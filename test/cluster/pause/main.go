// Command pause does nothing until it is told to end. It is what holds a Pod's
// sandbox on a node of package cluster, what runs in the containers of the test
// image, and the first process of the node itself.
package main

import (
	"os"
	"os/signal"
	"syscall"
)

func main() {
	end, children := make(chan os.Signal, 1), make(chan os.Signal, 1)
	signal.Notify(end, os.Interrupt, syscall.SIGTERM)
	signal.Notify(children, syscall.SIGCHLD)
	for {
		select {
		case <-end:
			return
		case <-children:
			// As process 1 it inherits what others leave behind.
			for pid := 1; pid > 0; {
				pid, _ = syscall.Wait4(-1, nil, syscall.WNOHANG, nil)
			}
		}
	}
}
