"""The grammar. Read in this order: site base delta lowrank combine layer params events method attach errors."""
