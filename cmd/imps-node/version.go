package main

import (
	"encoding/json"
	"fmt"
	"runtime"

	"github.com/spf13/cobra"
)

// Output formats of -o.
const (
	outputTable = "table"
	outputText  = "text"
	outputJSON  = "json"
)

func newVersionCommand() *cobra.Command {
	output := outputText
	cmd := &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := oneOf("output", output, outputText, outputJSON); err != nil {
				return usageError(cmd, err)
			}
			platform := runtime.GOOS + "/" + runtime.GOARCH
			if output == outputJSON {
				return json.NewEncoder(cmd.OutOrStdout()).Encode(map[string]string{
					"version": version, "goVersion": runtime.Version(), "platform": platform,
				})
			}
			_, err := fmt.Fprintf(cmd.OutOrStdout(), "imps-node %s, %s, %s\n", version, runtime.Version(), platform)
			return err
		},
	}
	cmd.Flags().StringVarP(&output, "output", "o", output, "`text` or json")
	completeValues(cmd, "output", outputText, outputJSON)
	return cmd
}
