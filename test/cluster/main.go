// Command cluster runs the control plane of package cluster outside a test:
// `go run ./test/cluster up`.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/imps-node/imps/test/cluster/cluster"
)

const (
	nodeFlag = "node"
	nodeName = "node-1"
)

func main() {
	os.Exit(run(context.Background(), os.Args[1:], os.Stdout, os.Stderr))
}

// run executes the command line and returns the exit code. It ends a cluster on
// SIGINT and SIGTERM, and with the context.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	defer stop()

	root := &cobra.Command{
		Use:          "cluster",
		Short:        "Run a real control plane on loopback, for tests and demonstrations",
		SilenceUsage: true,
	}
	up := &cobra.Command{
		Use:   "up",
		Short: "Start a control plane, print how to use it, and wait for Ctrl-C",
		Args:  cobra.NoArgs,
		RunE:  up,
	}
	up.Flags().Bool(nodeFlag, false, "start a node, too; for root on Linux")
	root.AddCommand(
		up,
		&cobra.Command{
			Use:   "build",
			Short: "Build the programs into the cache and print where they are",
			Args:  cobra.NoArgs,
			RunE:  build,
		},
	)
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	if err := root.ExecuteContext(ctx); err != nil {
		return 1
	}
	return 0
}

func build(cmd *cobra.Command, _ []string) error {
	binaries, err := cluster.Build(cmd.Context(), cmd.ErrOrStderr())
	if err != nil {
		return err
	}
	paths := []string{binaries.Etcd, binaries.APIServer, binaries.ControllerManager}
	if canRunNodes() {
		node, err := cluster.BuildNode(cmd.Context(), cmd.ErrOrStderr())
		if err != nil {
			return err
		}
		paths = append(paths, node.Kubelet, node.Containerd, node.Ctr)
	}
	for _, path := range paths {
		if path != "" {
			if _, err := fmt.Fprintln(cmd.OutOrStdout(), path); err != nil {
				return fmt.Errorf("print the paths: %w", err)
			}
		}
	}
	return nil
}

// canRunNodes says who needs the programs of a node.
func canRunNodes() bool {
	return runtime.GOOS == "linux" && os.Geteuid() == 0
}

func up(cmd *cobra.Command, _ []string) error {
	c, err := cluster.Run(cmd.Context(), cluster.WithProgress(cmd.ErrOrStderr()))
	if err != nil {
		return err
	}
	if err := serve(cmd, c); err != nil {
		return errors.Join(err, c.Stop())
	}
	return c.Stop()
}

// serve adds what the flags ask for, prints how to use it all and waits for
// the end.
func serve(cmd *cobra.Command, c *cluster.Cluster) error {
	node, err := cmd.Flags().GetBool(nodeFlag)
	if err != nil {
		return err
	}
	var about string
	if node {
		if _, err := c.StartNode(cmd.Context(), cluster.NodeConfig{Name: nodeName}); err != nil {
			return err
		}
		about = "There is no scheduler: a Pod runs with nodeName: " + nodeName + ". The one image there is " + cluster.PauseImageName + ".\n"
	}
	if _, err := fmt.Fprintf(cmd.OutOrStdout(), `The control plane is ready at %s.

  export KUBECONFIG=%s
  kubectl get namespaces

%sLogs are in %s. Ctrl-C ends it and removes everything.
`, c.Admin().Host, c.Kubeconfig(), about, c.Dir()); err != nil {
		return fmt.Errorf("print how to use it: %w", err)
	}
	<-cmd.Context().Done()
	return nil
}
