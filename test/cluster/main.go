// Command cluster runs the control plane of package cluster outside a test:
// `go run ./test/cluster up`.
package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/imps-node/imps/test/cluster/cluster"
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
	root.AddCommand(
		&cobra.Command{
			Use:   "build",
			Short: "Build the programs into the cache and print where they are",
			Args:  cobra.NoArgs,
			RunE:  build,
		},
		&cobra.Command{
			Use:   "up",
			Short: "Start a control plane, print how to use it, and wait for Ctrl-C",
			Args:  cobra.NoArgs,
			RunE:  up,
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
	for _, path := range []string{binaries.Etcd, binaries.APIServer, binaries.ControllerManager} {
		if path != "" {
			if _, err := fmt.Fprintln(cmd.OutOrStdout(), path); err != nil {
				return fmt.Errorf("print the paths: %w", err)
			}
		}
	}
	return nil
}

func up(cmd *cobra.Command, _ []string) error {
	c, err := cluster.Run(cmd.Context(), cluster.WithProgress(cmd.ErrOrStderr()))
	if err != nil {
		return err
	}
	if _, err := fmt.Fprintf(cmd.OutOrStdout(), `The control plane is ready at %s.

  export KUBECONFIG=%s
  kubectl get namespaces

Logs are in %s. Ctrl-C ends it and removes everything.
`, c.Admin().Host, c.Kubeconfig(), c.Dir()); err != nil {
		return fmt.Errorf("print how to use it: %w", err)
	}
	<-cmd.Context().Done()
	return c.Stop()
}
